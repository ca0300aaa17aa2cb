"""One piece of host memory for everything that is copied to adapter slots, page-locked where those are on a GPU."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable


class HostArena:
    """``nbytes`` bytes, taken once: locking pages takes long and holds up the GPU, so it is never done while serving.

    torch's own pinned allocator would round the size up to a power of two, so the memory is ours and CUDA is told.
    """

    def __init__(self, nbytes: int, *, pin_memory: bool) -> None:
        """Raises RuntimeError, with the remedy, when so much memory cannot be had or page-locked."""
        self.nbytes = nbytes
        with torch.inference_mode(False):  # filled by threads that are not in inference mode
            self.memory: Tensor = _allocate(nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)
        self._unpin: weakref.finalize[..., HostArena] | None = None
        if pin_memory and nbytes:
            self.memory.fill_(0)  # touched by all of torch's threads, which is much faster than by the driver
            address = self.memory.data_ptr()
            cudart: Any = torch.cuda.cudart()
            error = int(cudart.cudaHostRegister(address, nbytes, _PORTABLE))
            if error:
                raise RuntimeError(
                    f"store.host_cache_bytes is {nbytes} but so much host memory cannot be page-locked (CUDA error "
                    f"{error}): lower it, or free memory on this machine"
                )
            self._unpin = weakref.finalize(self, _unregister, address)

    def view(self, offset: int, elements: int, dtype: torch.dtype) -> Tensor:
        """(elements,) of ``dtype`` at a byte offset."""
        with torch.inference_mode(False):
            return self.memory[offset : offset + elements * dtype.itemsize].view(dtype)

    def close(self) -> None:
        """Unlock the pages, once no copy reads them. The memory goes with the last tensor that looks at it."""
        if self._unpin is not None:
            self._unpin()


def _allocate(nbytes: int) -> Tensor:
    try:
        memory = mmap.mmap(-1, nbytes)
    except (OSError, OverflowError) as error:
        raise RuntimeError(
            f"store.host_cache_bytes is {nbytes} but so much host memory cannot be had ({error}): lower it"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _unregister(address: int) -> None:
    torch.cuda.synchronize()
    cudart: Any = torch.cuda.cudart()
    cudart.cudaHostUnregister(address)

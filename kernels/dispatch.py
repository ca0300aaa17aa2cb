"""Which implementation serves a tensor: the Triton kernel or its torch twin.

The Triton names come from here so that every kernel module imports on a machine without Triton, where only the
twins run. Kernels are decorated with :func:`jit`, which is ``triton.jit`` where Triton exists.
"""

from __future__ import annotations

import os
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_TRITON = True
except ImportError:  # no Triton wheel for this platform
    triton: Any = None
    tl: Any = None
    gdc_launch_dependents: Any = None
    gdc_wait: Any = None
    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "gdc_launch_dependents",
    "gdc_wait",
    "interpreter_on",
    "jit",
    "launchable",
    "overlap",
    "tl",
    "triton",
    "use_triton",
]


def jit(function: Any = None, **options: Any) -> Any:
    """``triton.jit``, plain or with options; without Triton the function itself, which is then never launched."""
    if function is None:
        return partial(jit, **options)
    return triton.jit(function, **options) if HAS_TRITON else function


def interpreter_on() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for Triton's interpreter, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve ``tensor``; otherwise its torch twin does. Read at each call."""
    return HAS_TRITON and (tensor.is_cuda or interpreter_on())


def overlap(tensor: Tensor, operands_ready: bool = False) -> dict[str, Any]:
    """Launch options that let a kernel start while the one before it in the stream still runs.

    CUDA's programmatic dependent launch, on compute capability 9.0 and later; elsewhere a plain launch. The kernel's
    ``WAIT`` says when its programs call ``gdc_wait``: "first", before they touch memory, or "late", after they have
    loaded the ``operands_ready``, which no kernel running just before may write; "never" where the launch is plain.
    A program that touches nothing need not wait, but one of every launch must: a kernel that ended before the one
    before it would let the kernel after it overtake that.
    """
    if not tensor.is_cuda or torch.version.hip or _capability(tensor.get_device()) < (9, 0):
        return {"WAIT": "never"}
    return {"WAIT": "late" if operands_ready else "first", "launch_pdl": True}


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def launchable(kernel: Any, tensor: Tensor) -> Any:
    """``kernel`` itself, once it is known that it can run on ``tensor``'s device.

    Triton fixes at import whether a kernel is compiled or interpreted.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` was set after the kernel's module had been imported.
    """
    if not tensor.is_cuda and isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{kernel.__name__} was compiled for a GPU but got a {tensor.device} tensor: "
            "set TRITON_INTERPRET=1 before the kernels are imported, or unset it to use the torch twin"
        )
    return kernel

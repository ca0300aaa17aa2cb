"""What all cases of one kernel benchmark share: the device, its measured ceilings, and memory to read from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.report import Row
from benchmarks.common.timing import copy_bandwidth, matmul_rate, step_us
from kernels.dispatch import jit, launchable, use_triton

_RUN_US = 1000.0  # a timed run of about a millisecond: launching the graph is then a matter of permilles
_MOST_STEPS = 400


@jit
def _empty_kernel(pointer):
    return


class KernelSetting:
    """Made once a process. ``measured=False`` is for running kernels without timing them: small, with no ceilings.

    pool: 1-D random weights that all cases cut their adapters from, ten times an H100's L2.
    bandwidth: bytes a second of a 1 GiB copy, reads and writes counted. matmul: operations a second of a large product.
    """

    def __init__(self, measured: bool = True) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16
        on_gpu = self.device.type == "cuda"
        pool_bytes = (512 << 20) if on_gpu and measured else (16 << 20)
        torch.manual_seed(0)
        self.pool = torch.empty(pool_bytes // 2, dtype=self.dtype, device=self.device).normal_()
        self.repeats = 9 if on_gpu else 2
        self._scrubber = torch.zeros((48 << 20) if on_gpu and measured else 1, dtype=torch.int32, device=self.device)
        self.bandwidth = copy_bandwidth(self.device) if measured else 0.0
        self.matmul = matmul_rate(self.device, self.dtype) if measured else 0.0

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers in the benchmark's dtype, or in ``dtype``."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device).normal_()

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def steps(self, moved: int, flops: int = 0) -> int:
        """Steps of a timed run of a kernel that moves so many bytes and does so many operations."""
        if self.device.type != "cuda" or not self.bandwidth:
            return 2
        return max(4, min(_MOST_STEPS, round(_RUN_US / (1.5 + self.limit_us(moved, flops)))))

    def limit_us(self, moved: int, flops: int = 0) -> float:
        """Microseconds that the device needs at the least, by its measured ceilings."""
        return max(moved / self.bandwidth, flops / self.matmul) * 1e6 if self.bandwidth else 0.0

    def cold(self, *resident: Tensor) -> Callable[[], object]:
        """A call that empties the L2 of everything but ``resident``: what a decode step finds there too.

        By reading, as lines that were written would have to be written back while the kernel is timed; and for long
        enough, some 0.3 ms, that the host has launched what is timed when the device comes to it.
        """

        def clear() -> None:
            for _ in range(3):
                self._scrubber.max()
            for tensor in resident:
                tensor.sum()

        return clear

    def ceilings(self) -> list[Row]:
        """Result rows of the copy, of the matrix product and, where Triton runs on a GPU, of an empty kernel."""
        count = 2 << 30
        product = 2 * 8192**3
        rows: list[Row] = [
            {"kernel": "copy", "us": count / self.bandwidth * 1e6, "bytes": count},
            {"kernel": "matmul", "us": product / self.matmul * 1e6, "flops": product},
        ]
        if self.device.type == "cuda" and use_triton(self.pool):
            kernel = launchable(_empty_kernel, self.pool)
            rows.append(
                {
                    "kernel": "empty",
                    "us": step_us(lambda _: kernel[(1,)](self.pool), self.device, 400, before=self.cold()),
                }
            )
        return rows

"""How long device work takes, and how fast the device copies and multiplies: what every benchmark measures against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[int], object]


class Recording:
    """``step(i)`` for i in ``range(steps)``, one after the other, ready to be run and timed again and again.

    On CUDA the steps are captured in one graph, so that launches cost nothing on the host. On a CPU they are called.
    ``step(0)`` runs once before, so that whatever compiles or allocates for the first time has done so.
    """

    def __init__(self, step: Step, device: torch.device, steps: int) -> None:
        self._step, self._device, self._steps = step, device, steps
        self._graph: torch.cuda.CUDAGraph | None = None
        step(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                for index in range(steps):
                    step(index)
            self._graph.replay()

    def time_us(self, before: Callable[[], object] | None = None) -> float:
        """Microseconds a step of one run. ``before`` is called first, on the same stream, and not timed.

        With a ``before`` that keeps the device busy longer than the host needs to launch the graph, no launch is timed.
        """
        if before is not None:
            before()
        if self._graph is None:
            started = time.perf_counter()
            for index in range(self._steps):
                self._step(index)
            return (time.perf_counter() - started) / self._steps * 1e6
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self._steps * 1e3


def race(
    recordings: Mapping[str, Recording], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, float]:
    """Median microseconds a step of each recording; they take turns, so that a drifting clock touches all alike."""
    times: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(repeats):
        for name, recording in recordings.items():
            times[name].append(recording.time_us(before))
    return {name: statistics.median(values) for name, values in times.items()}


def step_us(
    step: Step,
    device: torch.device,
    steps: int = 40,
    repeats: int = 9,
    before: Callable[[], object] | None = None,
) -> float:
    """Median microseconds of ``step(i)`` for i in ``range(steps)``, called one after the other.

    Give each step inputs of its own, together larger than the L2, or the cache is what is measured.
    """
    return race({"": Recording(step, device, steps)}, repeats, before)[""]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device copy, reads and writes counted; best of several runs of 1 GiB.

    Not through a graph: a captured copy is another operation than one on a stream, and slower (2.44 against 2.95 TB/s
    on one NVIDIA H100 80GB HBM3).
    """
    count = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)

    def seconds() -> float:
        if device.type != "cuda":
            started = time.perf_counter()
            target.copy_(source)
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return 2 * count / min(seconds() for _ in range(10))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product; best of several."""
    size = 8192 if device.type == "cuda" else 256
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    recording = Recording(lambda _: torch.mm(left, right, out=out), device, 4)
    return 2 * size**3 / min(recording.time_us() for _ in range(5)) * 1e6

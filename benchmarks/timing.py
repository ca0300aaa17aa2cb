"""How long device work takes, and how fast the device copies: what every benchmark measures against."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch


def step_us(step: Callable[[int], object], device: torch.device, steps: int = 40, repeats: int = 9) -> float:
    """Median microseconds of ``step(i)`` for i in ``range(steps)``, called one after the other.

    On CUDA the steps are captured in one graph, so that launches cost nothing on the host; give each step inputs of its
    own, together larger than the L2, or the cache is what is measured. On a CPU the calls are timed as they are.
    """
    step(0)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            for index in range(steps):
                step(index)
            times.append((time.perf_counter() - started) / steps)
        return statistics.median(times) * 1e6
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(steps):
            step(index)
    graph.replay()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / steps)
    return statistics.median(times) * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device copy, reads and writes counted; best of several."""
    count = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * count / best


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What a GPU does while steps run as CUDA graphs: how long it stands idle between them, and what its kernels take."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_STEP_KERNELS = 32  # one launch of more kernels than this is a step's graph


class ReplayGaps:
    """``with ReplayGaps() as gaps: ...`` puts an event before and behind every graph that the process replays.

    What lies between one graph's end and the next one's start is copies of inputs and results, and idle time.
    """

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._replay = torch.cuda.CUDAGraph.replay

    def __enter__(self) -> ReplayGaps:
        replay, events = self._replay, self._events

        def timed(self: torch.cuda.CUDAGraph) -> None:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay(self)
            end.record()
            events.append((start, end))

        torch.cuda.CUDAGraph.replay = timed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.CUDAGraph.replay = self._replay
        torch.cuda.synchronize()

    def share(self) -> float:
        """Part of the time from the first start to the last that lay between graphs. Raises ValueError below two."""
        if len(self._events) < 2:
            raise ValueError("fewer than two graphs were replayed: measure for longer")
        between = sum(before.elapsed_time(after) for (_, before), (after, _) in pairwise(self._events))
        return between / self._events[0][0].elapsed_time(self._events[-1][0])


class KernelTimes:
    """``with KernelTimes() as times: ...`` profiles every thread of the process. Kernels run a little slower in it."""

    def __init__(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> KernelTimes:
        self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize()
        self._profiler.__exit__(kind, error, trace)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            self._events = json.loads(path.read_text())["traceEvents"]

    def a_step(self) -> dict[str, float]:
        """Kernel name -> microseconds a step, all its launches added, the longest first; see :func:`kernel_times`."""
        return kernel_times(self._events)


def kernel_times(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """From events of a Chrome trace as torch's profiler writes it (``dur`` in microseconds): the mean of the steps that
    ran as graphs, without the first and the last. Raises ValueError below three."""
    launches: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "kernel":
            launches[event["args"]["correlation"]].append(event)
    graphs = [launch for _, launch in sorted(launches.items()) if len(launch) > _STEP_KERNELS][1:-1]
    if not graphs:
        raise ValueError("fewer than three steps ran as graphs while the trace was taken: trace for longer")
    kernels: dict[str, float] = defaultdict(float)
    for launch in graphs:
        for event in launch:
            kernels[event["name"]] += event["dur"] / len(graphs)
    return dict(sorted(kernels.items(), key=lambda item: -item[1]))

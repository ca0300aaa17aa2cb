"""What a GPU did between two moments: how long it stood idle between steps, and which kernels took the time."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_STEP_KERNELS = 32  # one launch of more kernels than this is a step's graph


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Means over ``steps`` steps. step_us: from a graph's first kernel to the next one's. between_us: of that, from
    the last kernel of the one to the first of the other; idle_us: of that, without any kernel or copy.
    kernels: name -> microseconds a step, all its launches added, the longest first."""

    steps: int
    step_us: float
    between_us: float
    idle_us: float
    kernels: dict[str, float]

    @property
    def idle_share(self) -> float:
        """Part of the time in which nothing ran between one step's graph and the next."""
        return self.idle_us / self.step_us

    def table(self, kernels: int = 24) -> str:
        """The figures and the kernels that take longest, as text."""
        lines = [
            f"{self.steps} steps of {self.step_us:.0f} us, {self.between_us:.0f} us of them between graphs, "
            f"idle {self.idle_us:.0f} us ({self.idle_share:.1%}); kernels, us a step:"
        ]
        lines += [f"{us:10.1f}  {name[:100]}" for name, us in list(self.kernels.items())[:kernels]]
        return "\n".join(lines)


class GpuTrace:
    """``with GpuTrace() as trace: ...``, then ``trace.steps()``. Sees every thread of the process."""

    def __init__(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> GpuTrace:
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

    def steps(self) -> StepTrace:
        """The steps that ran as graphs, the first and the last of them left out. Raises ValueError below four."""
        return step_trace(self._events)


def step_trace(events: Sequence[Mapping[str, Any]]) -> StepTrace:
    """From events of a Chrome trace as torch's profiler writes it (``ts``, ``dur`` in microseconds)."""
    device = sorted(
        (event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")),
        key=lambda event: event["ts"],
    )
    launches: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in device:
        launches[event["args"]["correlation"]].append(event)
    graphs = [launch for launch in launches.values() if len(launch) > _STEP_KERNELS][1:-1]
    if len(graphs) < 2:
        raise ValueError("fewer than four steps ran as graphs while the trace was taken: trace for longer")
    starts = [launch[0]["ts"] for launch in graphs]
    ends = [max(event["ts"] + event["dur"] for event in launch) for launch in graphs]
    count = len(graphs) - 1
    between = idle = 0.0
    for end, start in zip(ends, starts[1:], strict=False):
        between += start - end
        reached = end
        for event in device:
            if end <= event["ts"] < start:
                idle += max(0.0, event["ts"] - reached)
                reached = max(reached, event["ts"] + event["dur"])
        idle += max(0.0, start - reached)
    kernels: dict[str, float] = defaultdict(float)
    for launch in graphs[:-1]:
        for event in launch:
            kernels[event["name"]] += event["dur"] / count
    ranked = dict(sorted(kernels.items(), key=lambda item: -item[1]))
    return StepTrace(count, (starts[-1] - starts[0]) / count, between / count, idle / count, ranked)

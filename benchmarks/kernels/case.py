"""One kernel on one shape: run once, timed beside its rivals, and put into a result row."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.common.report import Row
from benchmarks.common.timing import Recording, Step, race
from benchmarks.kernels.setting import KernelSetting

OURS = "ours"


@dataclass(frozen=True, slots=True)
class Contest:
    """Ways to do the same work; the one named ``ours`` is what the row is about.

    ways: kernels that are compiled when they first run. in_torch: what torch brings along. Both by name.
    moved: bytes that the work cannot but read and write. resident: tensors that are in the L2 when a run starts.
    check: ``check(call, strict)`` raises ValueError when a way's ``step(0)`` computes something else, by a stricter
    measure for ours; None where other tests tell.
    slower: how many times fewer steps a rival is timed for, for those that launch many kernels.
    """

    ways: dict[str, Step]
    moved: int
    in_torch: dict[str, Step] = field(default_factory=dict)
    flops: int = 0
    resident: tuple[Tensor, ...] = ()
    check: Callable[[Callable[[], object], bool], None] | None = None
    slower: dict[str, int] = field(default_factory=dict)


class Case(ABC):
    """What the command line's ``--ops`` chooses: it yields result rows. Cases travel between processes."""

    @property
    @abstractmethod
    def compiled_as(self) -> Hashable:
        """Cases for which this is equal compile mostly the same kernels."""

    @abstractmethod
    def run_once(self, setting: KernelSetting) -> None:
        """Launch every kernel of this case, so that Triton compiles it."""

    @abstractmethod
    def rows(self, setting: KernelSetting) -> Iterator[Row]:
        """Measure."""


class KernelCase(Case):
    """A case of one row."""

    @abstractmethod
    def contest(self, setting: KernelSetting) -> Contest:
        """Make the tensors."""

    @abstractmethod
    def names(self) -> Row:
        """The row's first columns: kernel, hidden, rank, batch, dist."""

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float | None:
        """The time that this project asks of the kernel on an H100, from the floor and its rivals' times."""
        return None

    def run_once(self, setting: KernelSetting) -> None:
        """Launch our kernel and the rivals that compile."""
        contest = self.contest(setting)
        for name, step in contest.ways.items():
            _attempt(self, name, lambda step=step: step(0))

    def rows(self, setting: KernelSetting) -> Iterator[Row]:
        """One row; a rival that fails is left out, and says so on stderr."""
        contest = self.contest(setting)
        steps = setting.steps(contest.moved, contest.flops)
        recordings: dict[str, Recording] = {}
        for name, step in (contest.ways | contest.in_torch).items():

            def prepare(name: str = name, step: Step = step) -> None:
                if contest.check is not None:
                    contest.check(lambda: step(0), name == OURS)
                count = max(2, steps // contest.slower.get(name, 1))
                recordings[name] = Recording(step, setting.device, count)

            if name == OURS:
                prepare()
            else:
                _attempt(self, name, prepare)
        times = race(recordings, setting.repeats, setting.cold(*contest.resident))
        us = times.pop(OURS)
        floor_us = contest.moved / setting.bandwidth * 1e6
        row = {"kernel": "", "hidden": 0, "rank": 0, "batch": 0, "dist": "-"} | self.names()
        row |= {"us": us, "bytes": contest.moved, "flops": contest.flops}
        row |= {"floor_us": floor_us, "of_copy": floor_us / us}
        limit = self.limit_us(floor_us, times) if setting.device.type == "cuda" else None
        row |= {"limit_us": limit, "ok": None if limit is None else us <= limit}
        yield row | {f"x_{name}": other / us for name, other in times.items()}


def _attempt(case: Case, name: str, call: Callable[[], object]) -> None:
    """A rival may lack support for a shape or a version; that must not end the run."""
    try:
        call()
    except Exception as error:
        lines = str(error).splitlines()
        print(f"{case}: {name} left out: {type(error).__name__}: {lines[0] if lines else ''}", file=sys.stderr)

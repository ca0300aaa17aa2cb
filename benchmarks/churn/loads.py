"""Cold adapters that are loaded beside a batch that decodes, in turns with time in which none is."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.churn.tiers import Tiers
from benchmarks.common.percentile import percentile
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row
from benchmarks.common.running_rows import RunningRows
from benchmarks.common.timeline import Timeline, follow
from benchmarks.decode.arrivals import RUNNING_TOKENS, SETTLED

Case = Literal["from disk to slot", "cold arrivals"]
CASES: tuple[Case, ...] = ("from disk to slot", "cold arrivals")


@dataclass(frozen=True, slots=True)
class ChurnLoads:
    """batch: rows that decode, each on an adapter of its own in a slot. rate: cold adapters a second.

    windows: how many there are of ``window_s`` seconds each, half of them with cold adapters, in the order calm, cold,
    cold, calm: the rows' contexts grow meanwhile, and so does the step.
    """

    batch: int
    prompt: int
    slots: int
    rate: float
    windows: int
    window_s: float

    async def measure(self, made: RandomEngine, case: Case) -> list[Row]:
        """Waits between tokens of the batch in windows with cold adapters against those without.

        "from disk to slot": adapters are fetched for no request, and nothing happens in the other windows. "cold
        arrivals": requests of one token arrive on cold adapters, and on adapters in slots in the other windows.
        """
        resident, others = made.adapters[: self.slots], made.adapters[self.slots :]
        needed = len([window for window in range(self.windows) if _is_cold(window)]) * self._each
        if needed > len(others):
            raise ValueError(
                f"{needed} cold adapters are needed but only {len(others)} have no slot: take fewer windows"
            )
        tiers = Tiers(made)
        await tiers.arrange(in_slots=resident)
        cold = iter(others)
        requests = [made.request(name, self.prompt, RUNNING_TOKENS) for name in resident[: self.batch]]
        gaps: dict[bool, list[float]] = {False: [], True: []}
        lines: dict[bool, list[Timeline]] = {False: [], True: []}
        before = tiers.moves()
        async with RunningRows(made.engine, requests, SETTLED) as running:
            for window in range(self.windows):
                is_cold = _is_cold(window)
                names = cold if is_cold else _again(resident[: self.batch])
                start = time.perf_counter()
                lines[is_cold] += await self._window(made, case, names, is_cold=is_cold)
                await running.steps(1)  # so that the last wait is complete
                gaps[is_cold] += running.gaps_ms(start, time.perf_counter())
        moved = tiers.moves() - before
        row: Row = {
            "mode": "loads",
            "case": case,
            "running": self.batch,
            "adapters": len(made.adapters),
            "prompt": self.prompt,
            "cold_per_s": self.rate,
            "quiet_itl_ms_p50": percentile(gaps[False], 0.5),
            "quiet_itl_ms_p99": percentile(gaps[False], 0.99),
            "itl_ms_p50": percentile(gaps[True], 0.5),
            "itl_ms_p99": percentile(gaps[True], 0.99),
        }
        if case == "cold arrivals":
            row["quiet_ttft_ms_p50"] = statistics.median(line.ttft_ms for line in lines[False])
            row["ttft_ms_p50"] = statistics.median(line.ttft_ms for line in lines[True])
        row["ratio"] = row["itl_ms_p99"] / row["quiet_itl_ms_p99"]
        return [row | moved.columns()]

    @property
    def _each(self) -> int:
        """How many arrive in one window."""
        return max(round(self.rate * self.window_s), 1)

    async def _window(
        self, made: RandomEngine, case: Case, names: Iterator[str], *, is_cold: bool
    ) -> Sequence[Timeline]:
        """What arrives in one window; returns at its end, or when all of it is through."""
        start = time.perf_counter()
        tasks: list[asyncio.Task[Timeline]] = []
        for number in range(self._each):
            await asyncio.sleep(max(start + number / self.rate - time.perf_counter(), 0.0))
            work: Coroutine[Any, Any, Timeline] | None = None
            if case == "cold arrivals":
                work = follow(made.engine, made.request(next(names), self.prompt, 1))
            elif is_cold:
                work = _load(made, next(names))
            if work is not None:
                tasks.append(asyncio.create_task(work))
        await asyncio.sleep(max(start + self.window_s - time.perf_counter(), 0.0))
        return await asyncio.gather(*tasks)


def _is_cold(window: int) -> bool:
    return window % 4 in (1, 2)


async def _load(made: RandomEngine, name: str) -> Timeline:
    """From disk to slot; the "token" is the answer."""
    line = Timeline(time.perf_counter())
    if not await made.engine.prefetch(name, made.digests[name]):
        raise RuntimeError(f"no slot was free for {name}")
    line.tokens.append(time.perf_counter())
    return line


def _again(names: Sequence[str]) -> Iterator[str]:
    while True:
        yield from names

"""What rows that decode notice of requests that arrive, and how fast those get their first token."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.percentile import percentile
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row
from benchmarks.common.running_rows import RunningRows
from benchmarks.common.timeline import Timeline, follow

SETTLED = 16  # tokens of each running row before anything is measured
QUIET = 64  # steps that are measured before anything arrives
RUNNING_TOKENS = 4096  # more than a running row makes before it is told to stop


@dataclass(frozen=True, slots=True)
class DecodeArrivals:
    """rows: how many decode, each on an adapter of its own as far as there are any. prompt: tokens of their prompts
    and of the short arrivals'. All adapters are in their slots."""

    rows: int
    prompt: int

    async def short(self, made: RandomEngine, arrivals: int, every: int = 8, tokens: int = 8) -> Row:
        """A short prompt arrives every eighth step and makes as many tokens, so that about one such row runs too."""
        async with self._running(made) as running:
            quiet = await self._quiet(running)
            start = time.perf_counter()
            tasks: list[asyncio.Task[Timeline]] = []
            for number in range(arrivals):
                await running.steps(every)
                name = made.adapters[(self.rows + number) % len(made.adapters)]
                tasks.append(asyncio.create_task(follow(made.engine, made.request(name, self.prompt, tokens))))
            lines = await asyncio.gather(*tasks)
            end = time.perf_counter()
        return self._row("arrivals", made, self.prompt, quiet, running.gaps_ms(start, end), lines)

    async def long(self, made: RandomEngine, prompt: int, repeats: int = 3) -> Row:
        """One long prompt arrives, and again when it has its first token; waits count from its sending to there."""
        async with self._running(made) as running:
            quiet = await self._quiet(running)
            lines: list[Timeline] = []
            gaps: list[float] = []
            for number in range(repeats):
                await running.steps(QUIET // 4)
                name = made.adapters[(self.rows + number) % len(made.adapters)]
                line = await follow(made.engine, made.request(name, prompt, 1))
                await running.steps(1)  # so that the wait which the prompt's last step caused is complete
                gaps += running.gaps_ms(line.sent, line.tokens[0])
                lines.append(line)
        return self._row("long_prompt", made, prompt, quiet, gaps, lines)

    def _running(self, made: RandomEngine) -> RunningRows:
        names = [made.adapters[row % len(made.adapters)] for row in range(self.rows)]
        requests = [made.request(name, self.prompt, RUNNING_TOKENS) for name in names]
        return RunningRows(made.engine, requests, SETTLED)

    async def _quiet(self, running: RunningRows) -> list[float]:
        start = time.perf_counter()
        await running.steps(QUIET)
        return running.gaps_ms(start, time.perf_counter())

    def _row(
        self,
        mode: str,
        made: RandomEngine,
        prompt: int,
        quiet: Sequence[float],
        gaps: Sequence[float],
        lines: Sequence[Timeline],
    ) -> Row:
        return {
            "mode": mode,
            "running": self.rows,
            "rank": made.mean_rank,
            "adapters": len(made.adapters),
            "prompt": prompt,
            "arrivals": len(lines),
            "quiet_itl_ms_p50": percentile(quiet, 0.5),
            "quiet_itl_ms_p99": percentile(quiet, 0.99),
            "itl_ms_p50": percentile(gaps, 0.5),
            "itl_ms_p99": percentile(gaps, 0.99),
            "ttft_ms_p50": statistics.median(line.ttft_ms for line in lines),
            "ttft_ms_p99": percentile((line.ttft_ms for line in lines), 0.99),
            "start_s": made.start_s,
        }

"""Poisson arrivals over more adapters than slots, and the same arrivals over adapters that all have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.churn.tiers import Tiers
from benchmarks.common.lengths import Lengths
from benchmarks.common.open_loop import offer
from benchmarks.common.percentile import percentile
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row
from benchmarks.common.timeline import Timeline, follow
from benchmarks.common.workload import Arrival, Workload


@dataclass(frozen=True, slots=True)
class ChurnPoisson:
    """rate: requests a second, for ``duration`` seconds. Adapters by Zipf's law with exponent 1; prompts of ``prompt``
    tokens and answers of ``tokens``. slots: of the engine, which has more adapters; all of them are in host memory.
    """

    rate: float
    duration: float
    prompt: int
    tokens: int
    slots: int

    async def measure(self, made: RandomEngine) -> list[Row]:
        """The row of adapters in slots, then that of all adapters with its ``ratio`` of times to first token.

        At the start of the latter the slots hold the least likely ones.
        """
        likely, unlikely = made.adapters[: self.slots], made.adapters[-self.slots :]
        tiers, rows = Tiers(made), list[Row]()
        for case, names, in_slots in (("resident", likely, likely), ("churn", made.adapters, unlikely)):
            await tiers.arrange(in_slots, [name for name in made.adapters if name not in in_slots])
            before = tiers.moves()
            lines = await self._offered(made, names)
            moved = tiers.moves() - before
            rows.append(self._row(case, names, lines) | moved.columns())
        rows[1]["ratio"] = rows[1]["ttft_ms_p50"] / rows[0]["ttft_ms_p50"]
        return rows

    async def _offered(self, made: RandomEngine, names: Sequence[str]) -> list[Timeline]:
        lengths = Lengths(self.prompt, 0.0, 1, self.prompt), Lengths(self.tokens, 0.0, 1, self.tokens)

        async def send(arrival: Arrival, due: float) -> Timeline:
            request = made.request(arrival.model, arrival.prompt_tokens, arrival.output_tokens)
            line = await follow(made.engine, request)
            line.sent = due
            return line

        arrivals = Workload(names, 1.0, *lengths).arrivals(self.rate, self.duration, seed=0)
        if not arrivals:
            raise ValueError(f"nothing arrives in {self.duration:g} s at {self.rate:g} a second: raise one of them")
        _, lines = await offer(arrivals, send)
        return lines

    def _row(self, case: str, names: Sequence[str], lines: Sequence[Timeline]) -> Row:
        start, end = min(line.sent for line in lines), max(line.tokens[-1] for line in lines)
        gaps = [gap for line in lines for gap in line.gaps_ms(start, end)]
        waits = [line.ttft_ms for line in lines]
        return {
            "mode": "poisson",
            "case": case,
            "adapters": len(names),
            "slots": self.slots,
            "prompt": self.prompt,
            "arrivals": len(lines),
            "rate": self.rate,
            "itl_ms_p50": percentile(gaps, 0.5),
            "itl_ms_p99": percentile(gaps, 0.99),
            "ttft_ms_p50": percentile(waits, 0.5),
            "ttft_ms_p99": percentile(waits, 0.99),
        }

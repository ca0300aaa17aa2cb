"""Short prompts that arrive beside running rows, their adapters in slots, in host memory or on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.churn.tiers import Tiers
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row
from benchmarks.decode.arrivals import DecodeArrivals

Place = Literal["resident", "host", "disk"]
PLACES: tuple[Place, ...] = ("resident", "host", "disk")


@dataclass(frozen=True, slots=True)
class ChurnArrivals:
    """rows: how many decode, each on an adapter of its own in a slot. arrivals: one every eighth step, on adapters of
    their own where these are not in slots. prompt: everybody's tokens. slots: of the engine, which has more adapters.
    """

    rows: int
    arrivals: int
    prompt: int
    slots: int

    async def measure(self, made: RandomEngine, place: Place) -> list[Row]:
        """place: where the arrivals' adapters are; after every arrival on one that has no slot, another is evicted."""
        resident, others = made.adapters[: self.slots], made.adapters[self.slots :]
        if place != "resident" and self.arrivals > len(others):
            raise ValueError(f"{self.arrivals} arrivals need as many adapters without a slot, not {len(others)}")
        tiers, test = Tiers(made), DecodeArrivals(self.rows, self.prompt)
        await tiers.arrange(resident, others if place == "host" else ())
        await test.short(made.among(resident), 1)  # what is slow once
        arriving = resident[self.rows :] if place == "resident" else others
        before = tiers.moves()
        row = await test.short(made.among(resident[: self.rows] + arriving), self.arrivals)
        moved = tiers.moves() - before
        return [{"mode": "arrivals", "case": place} | row | moved.columns()]

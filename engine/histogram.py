"""How often something was how large, counted where it happens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram has counted. counts[i]: values of at most bounds[i] and above the bound before; the last one, of
    those above every bound. total: sum of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Histogram:
    """Counts that only grow. One thread observes; any may read, and sees at most the last value in one half only."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: ascending upper bounds, in the unit of what is observed."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value`` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def read(self) -> Distribution:
        """What was counted so far."""
        return Distribution(self._bounds, tuple(self._counts), self._total)

"""How long prompts and answers are."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal token counts: ``median`` * exp(normal(0, ``sigma``)), rounded, then clipped to ``low`` .. ``high``.

    sigma 0 makes all equal. Raises ValueError for a median out of range.
    """

    median: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.median <= self.high:
            raise ValueError(
                f"a median of {self.median:g} tokens must lie within {self.low} (1 or more) and {self.high}"
            )
        if self.sigma < 0:
            raise ValueError(f"sigma is {self.sigma:g} but must be 0 or more")

    def draw(self, rng: random.Random) -> int:
        """One length in tokens."""
        return min(max(round(self.median * math.exp(rng.gauss(0.0, self.sigma))), self.low), self.high)

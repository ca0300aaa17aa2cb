"""Requests as users send them: when, to which model, with how long a prompt, for how long an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.distributions import zipf_weights
from benchmarks.common.lengths import Lengths


@dataclass(frozen=True, slots=True)
class Arrival:
    """at: seconds from the start. seed: of the prompt's words."""

    at: float
    model: str
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """models: what requests name, the likeliest first, by Zipf's law with exponent ``zipf``."""

    models: Sequence[str]
    zipf: float
    prompt: Lengths
    output: Lengths

    def arrivals(self, rate: float, duration: float, seed: int) -> list[Arrival]:
        """Poisson arrivals, ``rate`` a second for ``duration`` seconds, by time; the same for the same seed."""
        rng = random.Random(f"{seed} {rate}")
        weights = zipf_weights(len(self.models), self.zipf)
        made: list[Arrival] = []
        at = rng.expovariate(rate)
        while at < duration:
            model = rng.choices(self.models, weights)[0]
            made.append(Arrival(at, model, self.prompt.draw(rng), self.output.draw(rng), rng.getrandbits(48)))
            at += rng.expovariate(rate)
        return made

"""Which adapter each row of a batch uses."""

from __future__ import annotations

import random

DISTRIBUTIONS = ("distinct", "zipf", "identical", "base")


def choose_adapters(distribution: str, batch: int, adapters: int, rng: random.Random) -> list[int]:
    """Adapter numbers below ``adapters``, one a row; -1 is the base model.

    distinct: all different, as far as there are adapters. zipf: adapter n as often as 1 / (n + 1) says.
    """
    match distribution:
        case "base":
            return [-1] * batch
        case "identical":
            return [0] * batch
        case "distinct":
            return [row % adapters for row in range(batch)]
        case "zipf":
            return rng.choices(range(adapters), zipf_weights(adapters, 1.0), k=batch)
        case _:
            raise ValueError(f"distribution {distribution!r}: choose from {', '.join(DISTRIBUTIONS)}")


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Relative shares of ``count`` things, the likeliest first: 1 / (n + 1) ** exponent. Exponent 0 makes all alike."""
    return [(number + 1) ** -exponent for number in range(count)]

"""Which of the tried configurations a table gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kernels.op_configs import BATCH_KEYS

GAIN = 0.03  # less than this over the default is noise, and not worth a row
LOSS = 0.02  # what a point may lose where the others gain


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration's times. bits: a digest of what it computed; us: microseconds by point (batch or shape)."""

    op: str
    config: dict[str, int]
    bits: str
    us: tuple[float, ...]

    @property
    def order(self) -> tuple[object, ...]:
        """Equal for configurations that one table key may mix over its batches: a row's bits must not depend on them.

        Only the keys that ``BATCH_KEYS`` names may differ, and not even they where the results show a difference.
        """
        free = BATCH_KEYS.get(self.op, ())
        return self.bits, *sorted((key, value) for key, value in self.config.items() if key not in free)


def choose(trials: Sequence[Trial], default: Trial, mixed: bool = True) -> list[Trial] | None:
    """The best trial for each point, all of one order; None where none beats the default by ``GAIN`` anywhere.

    An order is judged by the geometric mean of its gains over the points and out when a point loses more than ``LOSS``.
    mixed: points may have configurations of their own; otherwise all get the same.
    """
    points = range(len(default.us))
    orders: dict[object, list[Trial]] = {}
    for trial in [default, *trials]:
        key = trial.order if mixed else tuple(sorted(trial.config.items()))
        orders.setdefault(key, []).append(trial)
    best: list[Trial] | None = None
    best_score = 0.0
    for group in orders.values():
        chosen = [_fastest(group, default, point) for point in points]
        gains = [math.log(default.us[point] / trial.us[point]) for point, trial in zip(points, chosen, strict=True)]
        if min(gains) < math.log(1 - LOSS) or max(gains) < -math.log(1 - GAIN):
            continue
        if best is None or sum(gains) > best_score:
            best, best_score = chosen, sum(gains)
    return best


def _fastest(group: Sequence[Trial], default: Trial, point: int) -> Trial:
    fastest = min(group, key=lambda trial: trial.us[point])
    gain = 1 - fastest.us[point] / default.us[point]
    return default if gain < GAIN and any(trial is default for trial in group) else fastest

"""Percentiles of measured times."""

from __future__ import annotations

import math
from collections.abc import Iterable


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least ``share`` (0 to 1) of all values do not exceed; None without values.

    A measured value, never one between two (the nearest-rank definition).
    """
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None

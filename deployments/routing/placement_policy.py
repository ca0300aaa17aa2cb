"""The tunables of placement."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """What ``place`` goes by. A replica's load is its rows, running and waiting, as a share of the rows that one of its
    steps holds: 1.0 is a full step. Its cost, which ranks those that are as good otherwise, adds what LoRA takes.

    spread_at: an adapter gets another copy when its rows exceed this share of what its copies' steps hold.
    max_copies: most replicas an adapter is spread over. shrink_at, shrink_after_s: it gives copies up again when its
    rows have been below that share of what would justify the copies for so long.
    spill_at: an adapter also gets another copy when each replica that has one is loaded above this, on one that is not.
    home_load_factor, home_load_slack: a replica is passed over, by an adapter that has to be loaded anyway, when its
    load exceeds ``factor * mean + slack``. rank_rows: rows that one rank of LoRA in a step costs as much as.
    prediction_ttl_s: how long an adapter whose request was sent to a replica counts as on its way to a slot there,
    when neither the request is under way any more nor news has come.
    """

    spread_at: float = 0.5
    max_copies: int = 1024
    shrink_at: float = 0.5
    shrink_after_s: float = 5.0
    spill_at: float = 1.0
    home_load_factor: float = 1.25
    home_load_slack: float = 0.125
    rank_rows: float = 0.02
    prediction_ttl_s: float = 1.0

    def __post_init__(self) -> None:
        least = {
            "max_copies": 1,
            "shrink_after_s": 0,
            "spill_at": 0,
            "home_load_factor": 1,
            "home_load_slack": 0,
            "rank_rows": 0,
        }
        for name, bound in (least | {"prediction_ttl_s": 0}).items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be at least {bound}")
        for name in ("spread_at", "shrink_at"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be above 0 and at most 1")

    def copies_for(self, rows: float, step_rows: float, replicas: int) -> int:
        """How many replicas should serve an adapter with that many rows, when a step holds ``step_rows``."""
        return max(1, min(ceil(rows / (self.spread_at * step_rows)), self.max_copies, replicas))

"""What a pool of slots tells of itself: each slot as it is now, and totals."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_store.load_stats import LoadTotals


@dataclass(frozen=True, slots=True)
class SlotPicture:
    """One slot now, for people to look at; digest: None for an empty one. idle_s: seconds since a request last came or
    left. The others as in ``Slot``."""

    class_rank: int
    digest: str | None = None
    name: str = ""
    rank: int = 0
    refs: int = 0
    loaded: bool = False
    pinned: bool = False
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotStats:
    """Totals since the start: acquisitions that found their adapter, that did not, and adapters evicted for others.

    exhausted: acquisitions that got nothing because every slot that fits was in use. copies: from host memory to slots,
    those that are through, by their own time. bytes: of the adapters in slots now. capacity_bytes: of all slots.
    """

    hits: int
    misses: int
    evictions: int
    exhausted: int
    copies: LoadTotals
    bytes: int
    capacity_bytes: int

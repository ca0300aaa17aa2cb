"""What a replica says of itself to the autoscaler: see ``ReplicaPressure``, whose fields these are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from deployments.scaling.decision import ReplicaPressure
from engine.engine import Engine


class PressureGauge:
    """Reads one engine now and then; what it loads is told as a share of the time between two readings."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read_at = time.monotonic()
        self._spent = self._seconds_spent()

    def read(self) -> dict[str, float]:
        """The pressure of now, by name."""
        now, spent = time.monotonic(), self._seconds_spent()
        elapsed = max(now - self._read_at, 1e-3)
        loading = max(after - before for before, after in zip(self._spent, spent, strict=True)) / elapsed
        self._read_at, self._spent = now, spent
        stats, load = self._engine.stats(), self._engine.load()
        pressure = ReplicaPressure(
            rows=load.running + load.waiting,
            max_rows=self._engine.settings.max_rows,
            wait_s=stats.longest_wait_s,
            slots_used=slots_used(dict(self._engine.settings.slots), dict(load.free_slots), self._pinned_ranks()),
            loading=loading,
        )
        return asdict(pressure)

    def _pinned_ranks(self) -> list[int]:
        slots = self._engine.parts.slots
        if slots is None:
            return []
        ranks = slots.residency().adapters
        return [ranks[digest] for digest in slots.pinned if digest in ranks]

    def _seconds_spent(self) -> tuple[float, float]:
        """On copies to slots, which go one after the other; on reading files, by as many threads as there are."""
        parts = self._engine.parts
        if parts.store is None or parts.slots is None:
            return 0.0, 0.0
        store = parts.store.stats()
        read = store.sources.read.seconds + store.pack.seconds
        return parts.slots.stats().copies.seconds, read / self._engine.settings.load_threads


def slots_used(slots: dict[int, int], free: dict[int, int], pinned: Sequence[int] = ()) -> float:
    """Share of the slots that is in use, as the rank sees it that has least left: any slot as large will do for it.

    slots, free: how many of each rank class there are, and are free. pinned: ranks of pinned adapters, whose slots do
    not count: every replica pins the same, so more of them would not have more for others.
    """
    others = dict(slots)
    for rank in pinned:
        fits = min((one for one, count in others.items() if one >= rank and count), default=None)
        if fits is not None:
            others[fits] -= 1
    shares = [0.0]
    for least in slots:
        count = sum(many for rank, many in others.items() if rank >= least)
        left = sum(many for rank, many in free.items() if rank >= least)
        shares.append(1 - left / count if count else 0.0)
    return max(shares)

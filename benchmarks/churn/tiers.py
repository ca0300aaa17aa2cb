"""Puts the adapters of a random engine where a measurement wants them, and counts what has to move after that."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row

_PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Moves:
    """Adapters that went from disk to host memory, and from there to slots."""

    reads: int
    copies: int

    def __sub__(self, earlier: Moves) -> Moves:
        return Moves(self.reads - earlier.reads, self.copies - earlier.copies)

    def columns(self) -> Row:
        """For a result's row."""
        return {"reads": self.reads, "copies": self.copies}


@dataclass(frozen=True, slots=True)
class Tiers:
    """The places of one engine's adapters: slots, host memory, files. Nobody may be using those that are moved.

    Files were written or read a moment ago, so what is "on disk" is in the system's page cache.
    """

    made: RandomEngine

    async def arrange(self, in_slots: Collection[str], in_host: Collection[str] = ()) -> None:
        """These in slots (and host memory), those in host memory alone, every other adapter in its files alone.

        Raises RuntimeError when an adapter is not where it was put.
        """
        made, store = self.made, self.made.engine.parts.store
        assert store is not None
        names = set(made.adapters) - set(in_slots)
        gone = await asyncio.gather(*(made.engine.unload(made.digests[name], _PATIENCE_S) for name in sorted(names)))
        if not all(gone):
            raise RuntimeError(f"{gone.count(False)} adapters are still in use")
        await asyncio.gather(*(made.engine.prefetch(name, made.digests[name]) for name in in_slots))
        for name in in_host:
            packed = await asyncio.to_thread(store.load, name, made.digests[name])
            store.host_cache.release(packed)
        stats = made.engine.stats()
        if set(stats.resident) != {made.digests[name] for name in in_slots}:
            raise RuntimeError(f"{len(stats.resident)} adapters are in slots, not the {len(in_slots)} that should be")
        if missing := {made.digests[name] for name in in_host} - set(stats.host_cached):
            raise RuntimeError(f"{len(missing)} adapters do not fit host memory")

    def moves(self) -> Moves:
        """Since the engine's start."""
        store = self.made.engine.parts.store
        assert store is not None
        return Moves(store.stats().host.misses, self.made.engine.stats().slot_misses)

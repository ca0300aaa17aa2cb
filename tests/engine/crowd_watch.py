"""Watches an engine that serves a crowd: what must hold at any time, and what must be left at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import torch

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.disk_cache import DiskCache
from adapter_store.slots import Residency
from engine.engine import Engine
from engine.stats import EngineStats
from tests.engine.crowd import Tenant

_EVERY_S = 0.02
_PATIENCE_S = 30.0


class Watch:
    """Give ``resident`` to the engine; then ``async with watch.over(engine, ...)`` looks at it all the time."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.looks = 0
        self.most_disk_bytes = 0
        self._version = 0

    def resident(self, residency: Residency) -> None:
        """For the engine's ``on_residency``."""
        if residency.version <= self._version:
            self.faults.append(f"residency {residency.version} came after {self._version}")
        self._version = residency.version
        held, free = len(residency.adapters), sum(residency.free.values())
        room = sum(residency.capacity.values())
        if held + free > room:
            self.faults.append(f"{held} adapters are in {room} slots of which {free} are empty")

    async def look(self, engine: Engine, disk: DiskCache | None = None) -> None:
        """Until it is cancelled. disk: where downloads are kept."""
        while True:
            self.looks += 1
            stats = engine.stats()
            if not stats.host_referenced_bytes <= stats.host_bytes <= stats.host_budget_bytes:
                self.faults.append(f"host memory: {stats}")
            if stats.running > engine.settings.max_rows or not stats.healthy:
                self.faults.append(f"the engine: {stats}")
            if disk is not None:
                taken = sum((await asyncio.to_thread(disk.sizes)).values())
                self.most_disk_bytes = max(self.most_disk_bytes, taken)
            await asyncio.sleep(_EVERY_S)


async def at_rest(engine: Engine, emptied: int = 0) -> EngineStats:
    """Wait until loads of requests that left are done, and check that everything was given back.

    emptied: slots that were emptied for no other adapter.
    """
    loads = engine._started()._loads
    assert loads is not None
    async with asyncio.timeout(_PATIENCE_S):
        while loads._loads or engine.stats().host_referenced_bytes or engine.stats().slots_in_use:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_for_adapter, stats.waiting_tenants) == (0, 0, 0, 0)
    assert stats.free_pages == stats.num_pages
    assert stats.slot_misses - stats.slot_evictions - emptied == len(stats.resident), "a slot was lost"
    store = engine.parts.store
    assert store is not None
    host = store.stats().host
    assert host.adapters == len(stats.host_cached) == len(set(stats.host_cached))
    return stats


def check_slots(engine: Engine, tenants: Iterable[Tenant], folder: Path) -> int:
    """Every slot of an engine at rest holds just its adapter, as its files make it; returns how many do."""
    slots, named, checked = engine.parts.slots, {tenant.digest: tenant for tenant in tenants}, 0
    assert slots is not None
    for slot in slots._slots:
        offset, rank = slots.slot_table[slot.index].tolist()
        if slot.digest is None:
            assert rank == 0
            continue
        tenant = named[slot.digest]
        packed = pack_checkpoint(folder / tenant.name, slots.layout, slots.max_rank, slots.arena.dtype, tenant.name)
        assert (slot.refs, slot.rank, offset) == (0, tenant.kind.rank, slot.offset)
        assert torch.equal(slots.arena[offset : offset + packed.slab.numel()], packed.slab)
        checked += 1
    return checked


async def empty(engine: Engine) -> int:
    """Unload everything: nothing is in use, so nothing is left. Returns how many slots that emptied."""
    before = engine.stats()
    for digest in {*before.resident, *before.host_cached}:
        assert await engine.unload(digest)
    after = engine.stats()
    assert (after.resident, after.host_cached, after.host_bytes) == ((), (), 0)
    return len(before.resident)

"""How long one adapter takes from tier to tier, with nothing else going on."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass

from adapter_store.slots import SlotPool
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row

_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class ChurnCopies:
    """repeats: how often each is measured, another adapter every time."""

    repeats: int

    async def measure(self, made: RandomEngine) -> list[Row]:
        """Host memory to slot, from the call to where a step may read it; and disk to host memory, verified and packed.

        The slots are of a pool apart, so that those of the engine stay as they are.
        """
        return await asyncio.to_thread(lambda: [self._to_slot(made), self._to_host(made)])

    def _to_slot(self, made: RandomEngine) -> Row:
        parts = made.engine.parts
        assert parts.store is not None
        assert parts.slots is not None
        pool = SlotPool(parts.slots.layout, {parts.slots.max_rank: 2}, parts.slots.arena.dtype, parts.slots.device)
        taken: list[float] = []
        nbytes = 0
        for number in range(self.repeats + 1):
            name = made.adapters[number % len(made.adapters)]
            packed = parts.store.load(name, made.digests[name])
            slot = pool.acquire(packed.digest, packed.rank)
            assert slot is not None
            started = time.perf_counter()
            pool.load(slot, packed)
            while not pool.ready(slot):
                if time.perf_counter() - started > _DEADLINE_S:
                    raise TimeoutError(f"a copy of {packed.nbytes} bytes is not done after {_DEADLINE_S:g} s")
            taken.append(time.perf_counter() - started)
            pool.release(slot)
            parts.store.host_cache.release(packed)
            nbytes = packed.nbytes
        return _row("host to slot", taken[1:], nbytes)

    def _to_host(self, made: RandomEngine) -> Row:
        store = made.engine.parts.store
        assert store is not None
        taken: list[float] = []
        nbytes = 0
        for number in range(self.repeats):
            name = made.adapters[-1 - number % len(made.adapters)]
            digest = made.digests[name]
            if not store.host_cache.remove(digest):
                raise RuntimeError(f"{name} was not in host memory, or in use")
            started = time.perf_counter()
            packed = store.load(name, digest)
            taken.append(time.perf_counter() - started)
            nbytes = packed.nbytes
            store.host_cache.release(packed)
        return _row("disk to host", taken, nbytes)


def _row(way: str, taken: list[float], nbytes: int) -> Row:
    median = statistics.median(taken)
    return {
        "mode": "copy",
        "case": way,
        "mib": nbytes / 2**20,
        "ms_p50": median * 1e3,
        "ms_max": max(taken) * 1e3,
        "gib_s": nbytes / 2**30 / median,
    }

"""Before a new replica takes requests: the adapters that will be its own, hottest first, are brought to its slots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray.exceptions import RayError

from adapter_store.errors import AdapterError
from deployments.background import end
from deployments.placement import rendezvous_weights
from deployments.routing.fleet_view import stable_hash
from deployments.routing.short_key import short_key
from deployments.scaling.heat import HeatMeter, HotAdapter

AT_ONCE = 8
TELL_SECONDS = 5.0

logger = logging.getLogger("ray.serve")


class Prefetcher(Protocol):
    """What warming up needs of an engine."""

    async def prefetch(self, name: str, digest: str | None = None) -> bool:
        """Bring an adapter to a slot, if there is one."""
        ...


def choose(
    hottest: Sequence[HotAdapter], replica: str, others: Sequence[str], slots: Mapping[int, int]
) -> list[HotAdapter]:
    """What a new replica should have: as many as ``slots`` (rank class -> free slots) hold, in the order to load them.

    Those first that have their home there, now that it has come, among the ``others``; what is left of the slots goes
    to the hottest of the rest, of which it takes the requests that are too many for their homes.
    """
    names = sorted({replica, *others})
    hashes = np.array([stable_hash(name) for name in names], np.uint64)
    place = names.index(replica)
    own = {one.digest for one in hottest if rendezvous_weights(short_key(one.digest), hashes).argmax() == place}
    ordered = sorted(hottest, key=lambda one: (one.digest not in own, -one.heat))
    free = dict(slots)
    chosen: list[HotAdapter] = []
    for one in ordered:
        fits = min((rank for rank, count in free.items() if count and rank >= one.rank), default=None)
        if fits is not None:
            free[fits] -= 1
            chosen.append(one)
    return chosen


async def warm_up(
    engine: Prefetcher, wanted: Callable[[], Awaitable[Sequence[HotAdapter]]], limit_s: float, at_once: int = AT_ONCE
) -> int:
    """Bring adapters here for at most ``limit_s`` seconds, those first that are first in ``wanted()``.

    Returns how many are here. An adapter that cannot be loaded is passed over, and so is everything that takes longer.
    """
    done = 0
    turns: list[HotAdapter] = []

    async def work() -> None:
        nonlocal done
        while turns:
            one = turns.pop()
            try:
                here = await engine.prefetch(one.reference, one.digest)
                done += here
            except AdapterError as error:
                logger.info("not warmed up: %s", error)

    try:
        async with asyncio.timeout(limit_s):
            turns = list(reversed(await wanted()))
            await asyncio.gather(*(work() for _ in range(at_once)))
    except TimeoutError:
        logger.info("warming up was left after %g s with %d adapters to go", limit_s, len(turns))
    except (RayError, ValueError) as error:
        logger.info("nobody could say what to warm up with: %s", error)
    return done


class HeatTeller:
    """A replica's word at the hub on what it is asked for, every ``TELL_SECONDS`` while it is asked."""

    def __init__(
        self, replica: str, find_hub: Callable[[], Awaitable[Any]], limit: int, ranks: Callable[[], dict[str, int]]
    ) -> None:
        """limit: adapters to tell of at most. ranks: digest -> rank of adapters that are here. Make it on the replica's
        loop."""
        self._replica = replica
        self._find_hub = find_hub
        self._limit = limit
        self._ranks = ranks
        self._meter = HeatMeter()
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._task = self._loop.create_task(self._run())

    def asked(self, reference: str | None, digest: str | None) -> None:
        """A request came; the base model's count nothing."""
        if reference is not None and digest is not None:
            self._meter.asked(reference, digest, self._loop.time())
            self._event.set()

    async def close(self) -> None:
        """Say what is left to say, and stop."""
        await end(self._task)
        if self._event.is_set():
            try:
                async with asyncio.timeout(1.0):
                    await self._tell(await self._find_hub())
            except (TimeoutError, RayError, ValueError):
                logger.info("the hub went away before it heard what this replica was asked for")

    async def _run(self) -> None:
        hub: Any = None
        while True:
            await self._event.wait()
            try:
                hub = hub or await self._find_hub()
                await self._tell(hub)
            except (RayError, ValueError) as error:
                logger.info("what is asked for could not be told: %s", error)
                hub = None
            await asyncio.sleep(TELL_SECONDS)

    async def _tell(self, hub: Any) -> None:
        self._event.clear()
        hottest = self._meter.hottest(self._limit, self._ranks(), self._loop.time())
        try:
            await hub.tell_heat.remote(self._replica, hottest)
        except (RayError, ValueError):
            self._event.set()
            raise

"""Replicas and routers without engines: the parts that tell and hear news, many to a process."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from deployments.news.holdings import Holdings
from deployments.news.publisher import NewsPublisher
from deployments.news.reader import NewsReader, listen
from deployments.routing.fleet_view import FleetView, ReplicaLoad
from deployments.routing.placement_policy import PlacementPolicy

SLOTS = 32
MAX_ROWS = 64


class Talkers:
    """Some replicas in one process: adapters come and go as a Poisson process in each, requests with them."""

    def __init__(self, hub: Any, names: Sequence[str], keys: int, changes_per_s: float) -> None:
        self._hub = hub
        self._names = names
        self._keys = keys
        self._changes_per_s = changes_per_s
        self._published = 0

    async def talk(self, seconds: float, settle_s: float) -> tuple[int, float]:
        """(messages sent, processor seconds) of so many seconds; before, everything is told once."""
        replicas = [self._replica(name) for name in self._names]
        await asyncio.sleep(settle_s)
        before, started = self._published, time.process_time()
        tasks = [asyncio.create_task(self._change(*replica)) for replica in replicas]
        await asyncio.sleep(seconds)
        used = self._published - before, time.process_time() - started
        for task in tasks:
            task.cancel()
        for publisher, *_ in replicas:
            await publisher.close()
        return used

    def _replica(self, name: str) -> tuple[NewsPublisher, Holdings, dict[str, int], random.Random]:
        draw = random.Random(name)
        holdings = Holdings()
        for _ in range(self._keys):
            holdings.in_host(f"{draw.getrandbits(64):016x}", held=True)
        rows: dict[str, int] = {}

        def load() -> ReplicaLoad:
            return ReplicaLoad(sum(rows.values()), 0, MAX_ROWS, 16 * len(rows), ((16, SLOTS),), rows=dict(rows))

        async def find() -> Any:
            return _Counted(self._hub, self)

        return NewsPublisher(name, holdings, load, find), holdings, rows, draw

    async def _change(
        self, publisher: NewsPublisher, holdings: Holdings, rows: dict[str, int], draw: random.Random
    ) -> None:
        slots: list[str] = []
        while True:
            await asyncio.sleep(draw.expovariate(self._changes_per_s))
            slots = [*slots[-SLOTS + 1 :], f"{draw.getrandbits(64):016x}"]
            holdings.in_slots(slots)
            rows[slots[-1]] = 1
            if len(rows) > MAX_ROWS // 2:
                del rows[next(iter(rows))]
            publisher.changed()

    def sent(self) -> None:
        """A message is on its way."""
        self._published += 1


class _Counted:
    """A hub whose ``publish`` is counted."""

    def __init__(self, hub: Any, talkers: Talkers) -> None:
        self._hub = hub
        self._talkers = talkers
        self.publish = self

    def remote(self, news: Any) -> Any:
        self._talkers.sent()
        return self._hub.publish.remote(news)


class Listeners:
    """Some routers in one process."""

    def __init__(self, hub: Any, replicas: Sequence[str], routers: int) -> None:
        self._hub = hub
        self._replicas = tuple(replicas)
        self._routers = routers

    async def hear(self, seconds: float, settle_s: float) -> tuple[list[float], int, float]:
        """(delay of the oldest change in each answer, answers, processor seconds) of so many seconds."""
        delays: list[float] = []
        answers = 0

        def heard(_: float, delay_s: float | None) -> None:
            nonlocal answers
            answers += 1
            if delay_s is not None:
                delays.append(delay_s)

        tasks = [asyncio.create_task(listen(self._find, self._reader(heard))) for _ in range(self._routers)]
        await asyncio.sleep(settle_s)
        delays.clear()
        before, started = answers, time.process_time()
        await asyncio.sleep(seconds)
        used = answers - before, time.process_time() - started
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        return list(delays), *used

    async def begin(self) -> tuple[int, float]:
        """What a new router reads: (bytes, seconds until it has taken them in)."""
        started = time.perf_counter()
        answer = await self._hub.watch_news.remote("new", None, 0.0)
        await self._reader(lambda *_: None).take(None, answer)
        return sum(news.nbytes for news in answer.news), time.perf_counter() - started

    def _reader(self, heard: Any) -> NewsReader:
        view = FleetView(PlacementPolicy())
        view.keep_only(self._replicas)
        reader = NewsReader(view, heard=heard)
        reader.keep_only(self._replicas)
        return reader

    async def _find(self) -> Any:
        return self._hub

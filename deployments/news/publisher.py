"""A replica's voice at the hub."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError

from deployments.background import end
from deployments.news.holdings import Holdings
from deployments.news.message import ReplicaNews, pack_keys, pack_load
from deployments.news.news_board import LEAST_PAUSE_SECONDS
from deployments.routing.fleet_view import ReplicaLoad

LOOK_SECONDS = 0.05  # how often the load is looked at
# A change waits so long for others that come with it: loads come in bursts, and a message takes processor time of every
# router, just when it has those requests to carry.
GATHER_SECONDS = 0.015
HEARTBEAT_SECONDS = 1.0  # a change of load that decides nothing is told this often, and that there is none
HUB_SECONDS = 2.0  # a hub that does not answer for so long is looked up anew
RETRY_SECONDS = 0.25

logger = logging.getLogger("ray.serve")


class NewsPublisher:
    """Tells what changed: about adapters after ``GATHER_SECONDS``, about load along with them, when it reaches another
    ``ReplicaLoad.stage`` and every ``HEARTBEAT_SECONDS``. What changes until then, while a message is under way, or in
    the pause that the hub asks for, goes together.

    All in one event loop: the one that makes this object.
    """

    def __init__(
        self,
        replica: str,
        holdings: Holdings,
        read_load: Callable[[], ReplicaLoad],
        find_hub: Callable[[], Awaitable[Any]],
    ) -> None:
        """read_load: called some 20 times a second. find_hub: gives the hub's actor handle; called again after an
        error, because Serve replaces a hub that died."""
        self._replica = replica
        self._holdings = holdings
        self._read_load = read_load
        self._find_hub = find_hub
        self._hub: Any = None
        self._sequence = 0
        self._whole = True  # what the hub has is not known: tell everything
        self._load = ReplicaLoad()  # told last
        self._told = 0.0  # when (monotonic)
        self._pause_s = LEAST_PAUSE_SECONDS
        self._since = time.time()
        self._event = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def changed(self) -> None:
        """There is something to tell that should not wait. Whatever else changed goes along with the next message."""
        if not self._event.is_set():
            self._since = time.time()
            self._event.set()

    async def close(self) -> None:
        """Tell once more and stop."""
        await end(self._task)
        self._whole = True
        try:
            await self._tell(self._next(True))
        except (TimeoutError, RayError, ValueError):
            logger.info("the hub went away before this replica did")

    async def _run(self) -> None:
        while True:
            pressing = self._event.is_set()
            self._event.clear()
            news = self._next(pressing)
            if news is not None:
                try:
                    await self._tell(news)
                except (TimeoutError, RayError, ValueError) as error:
                    logger.warning("news not delivered, trying again: %s", error)
                    self._hub, self._whole = None, True
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if self._whole:
                    continue
                await asyncio.sleep(self._pause_s)
            await self._wait()

    async def _wait(self) -> None:
        """Until something changed, or it is time to look at the load."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._event.wait()
        except TimeoutError:
            self._since = time.time()
        else:
            await asyncio.sleep(GATHER_SECONDS)

    def _next(self, pressing: bool) -> ReplicaNews | None:
        now, load = time.monotonic(), self._read_load()
        moved, due = load.stage != self._load.stage, now - self._told >= HEARTBEAT_SECONDS
        if not (pressing or self._whole or moved or due):
            return None  # whatever else changed can wait
        keys = packed = None
        if changes := self._holdings.changes():
            self._sequence += 1
            keys = pack_keys(changes)
        if self._whole:
            keys = pack_keys(self._holdings.everything())
        urgent = keys is not None or moved
        if not urgent and not due:
            return None
        if self._whole or load != self._load:
            packed = pack_load(load)
            self._load = load
        self._told = now
        return ReplicaNews(self._replica, self._sequence, self._whole, keys, packed, self._since, urgent)

    async def _tell(self, news: ReplicaNews | None) -> None:
        if news is None:
            return
        async with asyncio.timeout(HUB_SECONDS):
            self._hub = self._hub or await self._find_hub()
            receipt = await self._hub.publish.remote(news)
        self._whole, self._pause_s = receipt.whole_wanted, receipt.pause_s

"""A router's ear at the hub."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ray.exceptions import RayError

from deployments.news.board import Cursor
from deployments.news.message import ReplicaNews, unpack_keys, unpack_load
from deployments.news.news_board import TRUSTED_SECONDS, Answer
from deployments.routing.fleet_view import FleetView, Tier

WATCH_SECONDS = 1.0  # a hub that lives answers so often, news or not
HUB_SECONDS = 2.0
RETRY_SECONDS = 0.25
_LONG_BYTES = 4096

logger = logging.getLogger("ray.serve")


class NewsReader:
    """Brings a hub's answers into a view, in order and without gaps. Pure state beside the clock that it is given.

    Replicas of which there is no news, or none that can be trusted, count as idle and empty: a router that just
    started waits for nothing. Not trusted are replicas that the hub has not heard of for ``TRUSTED_SECONDS``, and all
    of them when the hub itself has not answered for so long.
    """

    def __init__(
        self,
        view: FleetView,
        clock: Callable[[], float] = time.monotonic,
        heard: Callable[[float, float | None], None] = lambda *_: None,
    ) -> None:
        """heard: told with each answer for how long there was none, and how long after the oldest of its urgent changes
        it came, by the wall clocks of two processes; None where it is not known. With each failure likewise."""
        self._view = view
        self._clock = clock
        self._tell = heard
        self._here: frozenset[str] = frozenset()
        self._alive: frozenset[str] = frozenset()  # replicas that the hub hears of
        self._sequences: dict[str, int] = {}  # of replicas here: what the view has
        self._unconfirmed: dict[str, float] = {}  # replicas that a new hub has not heard of yet -> when it must have
        self._cursor: Cursor | None = None
        self._complete = True
        self._heard = clock()

    @property
    def cursor(self) -> Cursor | None:
        """What to ask the hub for the news after; None for everything."""
        return self._cursor if self._complete else None

    @property
    def age_s(self) -> float:
        """Seconds since the hub was last heard."""
        return self._clock() - self._heard

    def keep_only(self, replicas: Iterable[str]) -> None:
        """These are all there are, and the view knows it."""
        before, self._here = self._here, frozenset(replicas)
        for gone in before - self._here:
            self._sequences.pop(gone, None)
        if (self._here - before) & self._alive:
            self._complete = False  # what they told is read already, and was nobody's

    def forget(self, replica: str) -> None:
        """It died."""
        self._sequences.pop(replica, None)
        self._view.forget(replica)

    async def take(self, asked: Cursor | None, answer: Answer) -> None:
        """Bring the answer to ``asked`` into the view. Lets others run in between, for it may be long."""
        now = self._clock()
        follows = asked is not None and asked[0] == answer.cursor[0]
        new_hub = self._cursor is not None and self._cursor[0] != answer.cursor[0]
        urgent = [news.since for news in answer.news if news.urgent]
        delay = max(0.0, time.time() - min(urgent)) if follows and urgent else None
        self._tell(self.age_s, delay)
        self._heard, self._cursor = now, answer.cursor
        self._complete |= not follows
        if answer.alive is not None:
            self._alive = frozenset(answer.alive)
            for silent in self._sequences.keys() - self._alive:
                if new_hub:
                    self._unconfirmed.setdefault(silent, now + TRUSTED_SECONDS)
                else:
                    self.forget(silent)
        for news in answer.news:
            if news.replica in self._here:
                self._unconfirmed.pop(news.replica, None)
                self._complete &= self._apply(news)
                if news.nbytes > _LONG_BYTES:
                    await asyncio.sleep(0)
        for replica in [replica for replica, until in self._unconfirmed.items() if until <= now]:
            del self._unconfirmed[replica]
            self.forget(replica)

    def unanswered(self) -> None:
        """The hub cannot be reached: after a while nothing that it said is believed any more."""
        self._tell(self.age_s, None)
        if self.age_s > TRUSTED_SECONDS and self._sequences:
            for replica in list(self._sequences):
                self.forget(replica)
            self._complete = False

    def _apply(self, news: ReplicaNews) -> bool:
        """False when something between them and what is known is missing."""
        known = self._sequences.get(news.replica)
        if news.keys is not None and (known is None or news.sequence > known):
            changes = unpack_keys(news.keys)
            if news.whole:
                for tier in Tier:
                    self._view.replace(news.replica, tier, changes.added[tier])
            elif known is not None and news.sequence == known + 1:
                for tier in Tier:
                    self._view.change(news.replica, tier, changes.added[tier], changes.removed[tier])
            else:
                return False
            self._sequences[news.replica] = news.sequence
        if news.load is not None:
            self._view.report(news.replica, unpack_load(news.load))
        return True


async def listen(find_hub: Callable[[], Awaitable[Any]], reader: NewsReader) -> None:
    """Keep a reader up to date until cancelled. Never raises on a lost hub."""
    name = uuid.uuid4().hex
    hub: Any = None
    while True:
        try:
            async with asyncio.timeout(WATCH_SECONDS + HUB_SECONDS):
                hub = hub or await find_hub()
                asked = reader.cursor
                answer = await hub.watch_news.remote(name, asked, WATCH_SECONDS)
        except (RayError, ValueError, TimeoutError) as error:
            logger.info("no news of replicas for now: %s", error)
            hub = None
            reader.unanswered()
            await asyncio.sleep(RETRY_SECONDS)
            continue
        await reader.take(asked, answer)
        await asyncio.sleep(answer.pause_s)

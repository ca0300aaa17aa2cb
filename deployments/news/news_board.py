"""Replicas' news at the hub: kept so that every reader gets what it has not read, in few bytes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile

from deployments.news.board import Cursor
from deployments.news.message import ReplicaNews

TRUSTED_SECONDS = 6.0  # a replica that says nothing for so long, or a hub, is not believed any more
# A call takes 0.5 to 1 ms of the hub's processor, so that all replicas and all routers together take about one.
PUBLISHED_PER_SECOND = 1200
ANSWERS_PER_SECOND = 600
LEAST_PAUSE_SECONDS = 0.01
SPARE_BYTES = 4096  # changes of a replica that are kept in any case before it is asked for everything again


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to a publisher. whole_wanted: tell everything next. pause_s: least time until then."""

    whole_wanted: bool
    pause_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a reader.

    news: what it has not read, oldest first of each replica. alive: every replica that is heard of, None where that
    has not changed. pause_s: least time until its next question, in which what comes is collected.
    """

    cursor: Cursor
    news: list[ReplicaNews]
    alive: tuple[str, ...] | None
    pause_s: float


@dataclass(slots=True)
class _Log:
    """One replica: its latest whole news and all changes since, and its latest load; each with the board's number."""

    keys: list[tuple[int, ReplicaNews]] = field(default_factory=list)
    load: tuple[int, ReplicaNews] | None = None
    heard: float = 0.0
    whole_bytes: int = 0
    change_bytes: int = 0

    def take(self, number: int, news: ReplicaNews) -> bool:
        """Keep the news. False when something is missing between them and what is kept."""
        known = self.keys[-1][1].sequence if self.keys else None
        if news.load is not None:
            self.load = number, replace(news, keys=None)
        if news.keys is None:
            return known == news.sequence
        keys = replace(news, load=None)
        if news.whole:
            # Whoever has read up to here knows all of it, if the replica only sums up what it told before.
            self.keys = [(self.keys[-1][0] if known == news.sequence else number, keys)]
            self.whole_bytes, self.change_bytes = news.nbytes, 0
        elif known is not None and news.sequence == known + 1:
            self.keys.append((number, keys))
            self.change_bytes += news.nbytes
        else:
            return known == news.sequence  # told again, because the answer got lost
        return True

    @property
    def long(self) -> bool:
        """Whether everything anew would be shorter."""
        return self.change_bytes > max(self.whole_bytes, SPARE_BYTES)

    def since(self, number: int) -> list[ReplicaNews]:
        """What a reader has not read that has read up to ``number``."""
        unread = [news for _, news in takewhile(lambda entry: entry[0] > number, reversed(self.keys))]
        unread.reverse()
        if self.load is not None and self.load[0] > number:
            unread.append(self.load[1])
        return unread


class NewsBoard:
    """For one asyncio actor. A cursor of another board, or none, gets everything that is known."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch = uuid.uuid4().hex
        self._number = 0
        self._logs: dict[str, _Log] = {}
        self._members = 0  # number of the last change of who is heard of
        self._readers: dict[str, float] = {}  # -> when it last asked
        self._swept = 0.0
        self._changed = asyncio.Event()

    def publish(self, news: ReplicaNews) -> Receipt:
        """Take in news; those without keys and load only say that the replica lives, those that are not urgent wake
        no reader."""
        self._sweep()
        log = self._logs.get(news.replica)
        if log is None or news.keys is not None or news.load is not None:
            self._number += 1
            if log is None or news.urgent:
                self._changed.set()
        if log is None:
            log = self._logs[news.replica] = _Log()
            self._members = self._number
        log.heard = self._clock()
        complete = log.take(self._number, news)
        return Receipt(not complete or log.long, _pause(len(self._logs) / PUBLISHED_PER_SECOND))

    @property
    def alive(self) -> tuple[str, ...]:
        """Replicas that are heard of."""
        return tuple(self._logs)

    async def watch(self, reader: str, cursor: Cursor | None, wait_s: float) -> Answer:
        """What came after ``cursor``; waits for it, for ``wait_s`` seconds at most."""
        self._readers[reader] = self._clock()
        if cursor is None or cursor[0] != self._epoch:
            number = -1
        else:
            number = cursor[1]
            try:
                async with asyncio.timeout(wait_s):
                    while self._number <= number:
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                pass
        self._sweep()
        news = [one for log in self._logs.values() for one in log.since(number)]
        alive = tuple(self._logs) if self._members > number else None
        return Answer((self._epoch, self._number), news, alive, _pause(len(self._readers) / ANSWERS_PER_SECOND))

    def _sweep(self) -> None:
        """Forget who has been silent for too long."""
        now = self._clock()
        if now - self._swept < TRUSTED_SECONDS / 10:
            return
        self._swept = now
        silent = [replica for replica, log in self._logs.items() if now - log.heard > TRUSTED_SECONDS]
        for replica in silent:
            del self._logs[replica]
        if silent:
            self._number += 1
            self._members = self._number
            self._changed.set()
        self._readers = {reader: at for reader, at in self._readers.items() if now - at <= TRUSTED_SECONDS}


def _pause(seconds: float) -> float:
    return max(LEAST_PAUSE_SECONDS, seconds)

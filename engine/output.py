"""From the step loop's thread to each reader's event loop."""

from __future__ import annotations

import asyncio
import copy
from collections import defaultdict
from typing import TypeVar

from engine.request import GenerationChunk

E = TypeVar("E", bound=Exception)


class OutputQueue:
    """What one request has produced and its reader has not taken yet: always a single chunk.

    Made on the reader's event loop, which alone touches it; others hand things over through an ``Outbox``.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._chunk: GenerationChunk | None = None
        self._error: Exception | None = None

    def put(self, item: GenerationChunk | Exception) -> None:
        """Add a chunk to what waits, or the error that ends the stream after it."""
        if isinstance(item, Exception):
            self._error = item
        else:
            self._chunk = item if self._chunk is None else self._chunk + item
        self._ready.set()

    async def get(self) -> GenerationChunk:
        """Everything since the last call, as one chunk; raises the error once nothing is left."""
        await self._ready.wait()
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._ready.clear()
        return chunk


def fresh(error: E) -> E:
    """A copy to raise. One object raised again and again, by several readers, gathers the frames of them all."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied


class Outbox:
    """Collects a step's results and wakes every event loop at most once for them. One thread only."""

    def __init__(self) -> None:
        self._items: defaultdict[asyncio.AbstractEventLoop, list[tuple[OutputQueue, GenerationChunk | Exception]]]
        self._items = defaultdict(list)

    def add(self, queue: OutputQueue, item: GenerationChunk | Exception) -> None:
        """Keep ``item`` for the next ``post``."""
        self._items[queue.loop].append((queue, fresh(item) if isinstance(item, Exception) else item))

    def post(self) -> list[OutputQueue]:
        """Send everything off. Returns the queues whose event loop is closed: nobody will ever read them."""
        lost: list[OutputQueue] = []
        items, self._items = self._items, defaultdict(list)
        for loop, pairs in items.items():
            try:
                loop.call_soon_threadsafe(_deliver, pairs)
            except RuntimeError:  # the loop is closed
                lost += [queue for queue, _ in pairs]
        return lost


def _deliver(pairs: list[tuple[OutputQueue, GenerationChunk | Exception]]) -> None:
    for queue, item in pairs:
        queue.put(item)

"""One snapshot a second for everybody who looks, and none for nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from deployments.api import sse
from deployments.protocol.errors import ApiError, from_exception, server_stopping

PAUSE_SECONDS = 1.0
MOST_VIEWERS = 64

logger = logging.getLogger("ray.serve")


class SnapshotFeed:
    """Takes snapshots in a task of its own from the first viewer to the last. One event loop."""

    def __init__(self, take: Callable[[], Awaitable[dict[str, Any]]], pause_s: float = PAUSE_SECONDS) -> None:
        """pause_s: least time from the beginning of one snapshot to that of the next."""
        self._take = take
        self._pause_s = pause_s
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._latest: bytes | None = None
        self._news = asyncio.Event()
        self.viewers = 0

    def watch(self) -> AsyncGenerator[bytes]:
        """Events until the viewer leaves or this gateway stops. One who is slow misses what is old.

        Raises ApiError, 503, when it stops already or too many look.
        """
        if self._closed:
            raise server_stopping()
        if self.viewers >= MOST_VIEWERS:
            message = f"{MOST_VIEWERS} pages look at this gateway already: close one, or try again in a moment"
            raise ApiError(503, message, kind="server_error", code="overloaded", headers={"Retry-After": "1"})
        return self._watch()

    def close(self) -> None:
        """End every viewer's stream: the gateway is to stop, and waits for its requests."""
        self._closed = True
        self._news.set()

    async def _watch(self) -> AsyncGenerator[bytes]:
        self.viewers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._run())
            seen = None
            while not self._closed:
                if self._latest is seen:
                    await self._news.wait()
                else:
                    seen = self._latest
                    assert seen is not None
                    yield seen
        finally:
            self.viewers -= 1
            if self.viewers == 0 and self._task is not None:
                self._task.cancel()
                self._task = self._latest = None

    async def _run(self) -> None:
        while True:
            pause = asyncio.create_task(asyncio.sleep(self._pause_s))
            try:
                self._latest = sse.event(await self._snapshot())
                self._news.set()
                self._news = asyncio.Event()
                await pause
            finally:
                pause.cancel()

    async def _snapshot(self) -> dict[str, Any]:
        try:
            return await self._take()
        except Exception as error:  # it is told, and the next one may be better
            explained = from_exception(error)
            if explained.status == 500:
                logger.error("the console's snapshot failed", exc_info=error)
            return explained.body()

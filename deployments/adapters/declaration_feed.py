"""A gateway's or replica's ear at the hub for what is declared at run time, and a gateway's voice there."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError

from deployments.adapters.declarations import Declaration, Declarations
from deployments.background import Background
from deployments.news.board import Cursor
from deployments.protocol.errors import ApiError

RETRY_SECONDS = 0.5
FIRST_NEWS_SECONDS = 5.0

logger = logging.getLogger("ray.serve")


class DeclarationFeed(Background):
    """Keeps ``known`` up to date, and calls ``changed`` with what is new, for as long as it runs.

    find_hub: gives the hub's actor handle; called again after an error, because Serve replaces a hub that died.
    """

    def __init__(
        self, find_hub: Callable[[], Awaitable[Any]], changed: Callable[[list[Declaration]], Awaitable[None]]
    ) -> None:
        self.known = Declarations()
        self._find_hub = find_hub
        self._changed = changed
        self._reader = uuid.uuid4().hex
        self._hub: Any = None
        self._heard = asyncio.Event()

    @property
    def heard(self) -> bool:
        """Whether everything that was declared before this process began is known."""
        return self._heard.is_set()

    async def wait_heard(self) -> bool:
        """Wait a while for ``heard``."""
        self.start()
        try:
            await asyncio.wait_for(self._heard.wait(), FIRST_NEWS_SECONDS)
        except TimeoutError:
            return False
        return True

    async def declare(self, name: str, **changes: Any) -> Declaration:
        """Change the word on ``name``; on return every gateway and replica that answers knows it.

        Raises ApiError: 409 when somebody else changed it at the same time, 503 when the hub cannot be reached.
        """
        if not await self.wait_heard():
            raise _no_hub("it has not answered yet")
        known = self.known.get(name)
        wanted = replace(known, **changes)
        try:
            hub = self._hub or await self._find_hub()
            latest, spread = await hub.declare.remote(wanted, known)
        except (RayError, ValueError) as error:
            raise _no_hub(str(error).splitlines()[0]) from error
        if not spread:
            logger.warning("a gateway or replica has not confirmed the change to adapter %r yet", name)
        await self._take([latest])
        if replace(latest, stamp=0) != replace(wanted, stamp=0):
            raise ApiError(409, f"adapter {name!r} was changed by somebody else just now: look again", code="conflict")
        return latest

    async def _run(self) -> None:
        cursor: Cursor | None = None
        while True:
            try:
                self._hub = self._hub or await self._find_hub()
                answered, news = await self._hub.watch_declarations.remote(self._reader, cursor)
                if cursor is not None and cursor[0] != answered[0] and self.known.by_name:
                    await self._hub.restore.remote(list(self.known.by_name.values()))
            except (RayError, ValueError) as error:
                logger.info("no news of declared adapters for now: %s", error)
                self._hub = None
                await asyncio.sleep(RETRY_SECONDS)
                continue
            cursor = answered
            await self._take(news)
            self._heard.set()

    async def _take(self, news: list[Declaration]) -> None:
        fresh = self.known.merge(news)
        if not fresh:
            return
        try:
            await self._changed(fresh)
        except Exception:  # the feed must go on
            logger.exception("a change of declared adapters could not be applied")


def _no_hub(why: str) -> ApiError:
    message = f"the hub that spreads declared adapters cannot be reached ({why}): try again in a moment"
    return ApiError(503, message, kind="server_error", code="hub_unavailable", headers={"Retry-After": "1"})

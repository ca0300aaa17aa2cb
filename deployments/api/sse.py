"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "text/event-stream"
# Proxies must neither store nor hold back the stream.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("ray.serve")


class EventStream(StreamingResponse):
    """Events as they are made. However the response ends, their generator has ended too."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = events
        super().__init__(events, media_type=MEDIA_TYPE, headers=HEADERS)

    async def listen_for_disconnect(self, receive: Receive) -> None:
        """Serve breaks ``receive`` when the client goes away: that is a disconnect, not a failure of ours."""
        try:
            await super().listen_for_disconnect(receive)
        except Exception as error:
            logger.debug("the client is gone: %r", error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client that left in between leaves a generator that nobody reads, or that was never begun.
            await self._events.aclose()


def event(data: dict[str, Any]) -> bytes:
    """One ``data:`` event. JSON escapes line breaks, so it is always one line."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

"""What a request is called, in its answer and in what is logged of it."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_SAFE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_current: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """The id of the HTTP request that this task answers; empty outside of one."""
    return _current.get()


class RequestId:
    """ASGI middleware: the client's X-Request-Id where it can stand in a log, else one made here.

    answers: whether answers, errors too, carry it. Not where something in front puts the header it was sent there:
    Serve's proxy does, and gives a request without one its own.
    """

    def __init__(self, app: ASGIApp, answers: bool = True) -> None:
        self._app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(HEADER, "")
        request_id = sent if _SAFE.fullmatch(sent) else uuid.uuid4().hex
        _current.set(request_id)  # of this request's own task

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, named if self._answers else send)

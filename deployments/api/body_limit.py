"""A bound on what one request body may take of the gateway's memory and time."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: whoever reads a body of more than ``max_bytes`` gets an HTTPException 413 instead.

    Where the length is declared nothing is read at all, else one message too many. The exception comes out of
    ``receive``, so within the application's own handlers, which put it into the error envelope.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        declared_bytes = int(declared) if declared.isdecimal() else 0
        received_bytes = 0

        def check(size: int) -> None:
            if size > self._max_bytes:
                raise HTTPException(
                    413, f"the body has more than {self._max_bytes} bytes: send less, or have max_body_bytes raised"
                )

        async def counted() -> Message:
            nonlocal received_bytes
            check(declared_bytes)
            message = await receive()
            received_bytes += len(message.get("body", b""))
            check(received_bytes)
            return message

        await self._app(scope, counted, send)

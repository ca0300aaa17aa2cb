"""Whose key came with a request: the one door that every HTTP request goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.protocol.errors import ApiError
from deployments.tenants.caller import Caller, remember
from deployments.tenants.tenant import Tenant

API_TOKEN_HEADER = "x-adapter-token"  # noqa: S105 - the header's name
NOBODY = Tenant(adapters=(), base_model=False, server_credentials=False)
PUBLIC = frozenset({"/health"})  # what load balancers ask, and says nothing
# The console's page, which says nothing either: see ``deployments.console.routes``.
PUBLIC |= {"/console", "/console/", *(f"/console/{name}.js" for name in ("console", "page", "playground"))}
PUBLIC |= {"/console/console.css", "/console/icon.svg"}


_QUOTAS = [f"{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")]
ANSWERED = ("x-request-id", "retry-after", "retry-after-ms", *(f"x-ratelimit-{quota}" for quota in _QUOTAS))


class Keys(Protocol):
    """What knows the keys."""

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; None for a key that there is not."""
        ...


class Authentication:
    """ASGI middleware: a request without a key that exists gets a 401 before anything of it is read; for every other
    ``CallerOf`` says who sent it. Without ``keys`` anyone may ask."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = self._caller(scope, headers)
        if isinstance(caller, ApiError):
            answer = JSONResponse(caller.body(), status_code=caller.status, headers=caller.headers)
            await answer(scope, receive, send)
            return
        caller.api_token = headers.get(API_TOKEN_HEADER) or None
        remember(scope.setdefault("state", {}), caller)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(caller.headers)
            await send(message)

        await self._app(scope, receive, with_headers)

    def _caller(self, scope: Scope, headers: Headers) -> Caller | ApiError:
        if self._keys is None:
            return Caller()
        key = _key(headers)
        caller = None if key is None else self._keys.caller(key)
        if caller is not None:
            return caller
        if scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC:
            return Caller(NOBODY, "tenant")
        message = "no API key: send one as Authorization: Bearer KEY" if key is None else "this API key does not exist"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


def add_guard(app: FastAPI, keys: Keys | None, cors_origins: Sequence[str]) -> None:
    """Have every request come through ``Authentication``. cors_origins: web pages of these origins may ask, with a key
    that they were given ("*": of any); browsers keep all others from reading what is answered."""
    app.add_middleware(Authentication, keys=keys)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=ANSWERED,
        )

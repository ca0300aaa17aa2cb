"""``/console``: the page for anyone, who learns nothing from it, and the events for whoever administers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import RedirectResponse, Response

from deployments.api import sse
from deployments.console.snapshot_feed import SnapshotFeed

_PAGE = Path(__file__).with_name("page")
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = {"/console": "index.html"} | {
    f"/console/{name}": name for name in ("console.css", "console.js", "page.js", "playground.js", "icon.svg")
}
# Nothing but the page's own files, and no way for a text to become markup, whoever wrote it (Trusted Types).
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_console_routes(app: FastAPI, feed: SnapshotFeed, allowed: Callable[..., None]) -> None:
    """allowed: a dependency that raises ApiError for who may not see how the fleet does."""
    for path, name in _FILES.items():
        app.add_api_route(path, _file(name), include_in_schema=False)

    @app.get("/console/", include_in_schema=False)
    async def elsewhere() -> Response:
        return RedirectResponse("../console", 308)

    @app.get("/console/events", include_in_schema=False, dependencies=[Depends(allowed)])
    async def events() -> Response:
        return sse.EventStream(feed.watch())


def _file(name: str) -> Callable[[], Any]:
    content, media_type = (_PAGE / name).read_bytes(), _TYPES[name.rpartition(".")[2]]

    async def get() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return get

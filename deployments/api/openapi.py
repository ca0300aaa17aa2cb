"""What the OpenAPI document says of answers: one table of errors for all routes, and streams beside whole answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from deployments.protocol.answers import ErrorAnswer

_ERRORS = {
    400: "the body is no JSON, or a field of it is wrong",
    401: "no valid API key",
    403: "this API key may not do that",
    404: "there is no such model, or no such path",
    405: "this path has other methods",
    413: "the body is longer than gateway.max_body_bytes",
    422: "the adapter cannot be applied whole",
    429: "a limit on requests or tokens is reached: see Retry-After",
    500: "a failure of the server",
    503: "nobody can answer now: see Retry-After",
}
_EVERYWHERE = (400, 401, 403, 405, 429, 500)
GENERATES = (404, 413, 422, 503)  # a route that generates


def answers(
    model: type[BaseModel], *errors: int, streamed: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route. errors: statuses of its own beside those of every route. streamed: what an
    event's data are, for a route that also answers with a stream."""
    whole: dict[str, Any] = {"model": model}
    if streamed is not None:
        whole["content"] = event_stream(streamed, ErrorAnswer, last="[DONE]")
        whole["description"] = f"The whole answer, or with stream=true events with {streamed.__name__} as their data."
    told = sorted({*_EVERYWHERE, *errors})
    return {200: whole, **{status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in told}}


def event_stream(*shapes: type[BaseModel], last: str | None = None) -> dict[str, Any]:
    """``content`` of an answer whose events have data of one of ``shapes``; last: what the last one says instead."""
    refs = [{"$ref": f"#/components/schemas/{shape.__name__}"} for shape in shapes]
    event = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    data = event if last is None else {"anyOf": [{"const": last}, event]}
    return {"text/event-stream": {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}}


def describe_events(app: FastAPI, *events: type[BaseModel]) -> None:
    """Put the shapes of events, which FastAPI does not see, into the app's document."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = made()["components"]["schemas"]
            for event in events:
                shape = event.model_json_schema(ref_template="#/components/schemas/{model}")
                shapes = {**shape.pop("$defs"), event.__name__: shape}
                schemas.update({name: one for name, one in shapes.items() if name not in schemas})
        return made()

    app.openapi = document

"""What crosses from a replica to a gateway: plain dicts, errors included.

A refusal is an item of the stream, not a raised exception: it keeps its type over every transport, and Serve
does not log a traceback for each bad request of a tenant.
"""

from __future__ import annotations

from typing import Any

from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from engine.request import EngineDead, EngineOverloaded, GenerationChunk, GenerationFailed, InvalidRequest

REFUSALS = (InvalidRequest, EngineOverloaded, EngineDead, GenerationFailed, AdapterError)
_PLAIN_ERRORS = {kind.__name__: kind for kind in (EngineOverloaded, EngineDead, GenerationFailed)}
_ADAPTER_ERRORS = {
    kind.__name__: kind for kind in (AdapterNotFound, AdapterRefused, AdapterUnavailable, AdapterChanged)
}


def encode_chunk(chunk: GenerationChunk) -> dict[str, Any]:
    """One item of a stream."""
    return chunk.to_dict()


def encode_error(error: Exception, replica: str) -> dict[str, Any]:
    """The last item of a stream that ``replica`` ended with one of ``REFUSALS``."""
    match error:
        case InvalidRequest():
            details: dict[str, Any] = {"param": error.param, "code": error.code}
        case AdapterError():
            details = {"adapter": error.adapter, "reason": error.reason}
        case _:
            details = {}
    return {"error": type(error).__name__, "message": str(error), "replica": replica, **details}


def decode(item: dict[str, Any], model: str) -> GenerationChunk:
    """The chunk of an item; an item that is an error is raised.

    model: what the client called the adapter, for messages: a replica knows it by its reference only.
    """
    raise_error(item, model)
    return GenerationChunk.from_dict(item)


def raise_error(item: dict[str, Any], model: str) -> None:
    """Raise what ``encode_error`` made; nothing happens for another item."""
    kind = item.get("error")
    if kind is None:
        return
    if kind == InvalidRequest.__name__:
        raise InvalidRequest(item["message"], item["param"], item.get("code"))
    if kind in _PLAIN_ERRORS:
        raise _PLAIN_ERRORS[kind](item["message"])
    raise _ADAPTER_ERRORS[kind](model, item["reason"])

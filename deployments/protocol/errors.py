"""Every error a client can see: one exception, one JSON envelope, one table from our errors to HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused
from engine.request import EngineOverloaded, GenerationFailed, InvalidRequest

RETRY_AFTER_SECONDS = 1


class ReplicaLost(RuntimeError):
    """The replica that ran a request went away. ``started`` tells whether tokens had been sent."""

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class ApiError(Exception):
    """An answer in OpenAI's error envelope: HTTP ``status``, ``type``, the offending field, a stable ``code``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """HTTP 400 for a field that is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """HTTP 400 for a field that is right for OpenAI but that this server does not have."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def from_exception(error: Exception) -> ApiError:
    """What a client is told. Anything unknown is a 500 without details: those go to the log."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return invalid(error.param, str(error), code=error.code)
        case AdapterError():
            return _adapter_error(error)
        case EngineOverloaded():
            return _try_again("all replicas are at their limit: try again in a moment", "overloaded")
        case ReplicaLost() if not error.started:
            return _try_again(str(error), "replica_unavailable")
        case _:
            codes: dict[type[Exception], str] = {ReplicaLost: "replica_died", GenerationFailed: "generation_failed"}
            code = codes.get(type(error))
            message = str(error) if code else "internal error: see the server's log"
            return ApiError(500, message, kind="server_error", code=code or "internal_error")


def _adapter_error(error: AdapterError) -> ApiError:
    match error:
        case AdapterNotFound():
            message = f"model {error.adapter!r} does not exist: {error.reason}. GET /v1/models lists what is served"
            return ApiError(404, message, kind="not_found_error", param="model", code="model_not_found")
        case AdapterRefused():
            return ApiError(422, str(error), param="model", code="adapter_refused")
    return _try_again(str(error), "adapter_unavailable", param="model")


def about_reference(error: AdapterError, reference: str) -> ApiError:
    """The same for who declares ``reference``: a name that is new cannot be what is wrong."""
    told = _adapter_error(error)
    code = "adapter_not_found" if isinstance(error, AdapterNotFound) else told.code
    message = f"reference {reference}: {error.reason}"
    return ApiError(told.status, message, kind=told.kind, param="reference", code=code, headers=told.headers)


def server_stopping() -> ApiError:
    """The gateway itself goes away, and with it whatever it still has under way."""
    return _try_again(
        "the server is stopping and could not finish this request: try again in a moment", "server_stopping"
    )


def _try_again(message: str, code: str, *, param: str | None = None) -> ApiError:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(503, message, kind="server_error", param=param, code=code, headers=headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """HTTP 400 for the first of pydantic's errors, naming the field as ``messages[0].content``."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(None, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    param = ""
    for part in first["loc"]:
        if part == "body":
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    if not param:
        return invalid(None, "the body must be a JSON object, sent with the header Content-Type: application/json")
    return invalid(param, f"{param}: {first['msg']}")

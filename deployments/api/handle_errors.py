"""Errors of handle calls. They must load in a process that has Ray and nothing of ours."""

from __future__ import annotations

from deployments.protocol.errors import ApiError

_BUILTINS: dict[int, type[Exception]] = {400: ValueError, 404: LookupError, 422: ValueError, 503: ConnectionError}


def builtin_error(error: ApiError) -> Exception:
    """A built-in exception with the envelope's fields as attributes.

    400 and 422 (bad request, refused adapter): ValueError. 404 (no such model): LookupError. 503 (try again):
    ConnectionError. Anything else: RuntimeError. Attributes: ``status``, ``code``, ``type``, ``param``. A caller
    in another process gets Ray's wrapper, which is also an instance of that class and has it as ``cause``.
    """
    raised = _BUILTINS.get(error.status, RuntimeError)(error.message)
    # Attributes, not arguments: pickle restores these for every built-in exception.
    raised.__dict__.update(status=error.status, code=error.code, type=error.kind, param=error.param)
    return raised

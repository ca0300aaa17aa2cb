"""The replicas as one thing that answers requests: routing by adapter, retries, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from opentelemetry.trace import NoOpTracer, Tracer
from ray.exceptions import RayActorError, RaySystemError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from deployments import wire
from deployments.observability.request_record import RequestRecord
from deployments.observability.spans import route_span
from deployments.observability.tracing import carried
from deployments.protocol.errors import ReplicaLost, server_stopping
from engine.request import EngineDead, EngineOverloaded, GenerationChunk, GenerationRequest

RETRIES = 2
# Engines that one request may find broken: it may be what breaks them, and each costs everybody a replica.
BROKEN_ENGINES = 2


class _Cut(Exception):
    """A stream that ended without saying why."""


_LOST = (
    _Cut,
    EngineDead,
    RayActorError,
    RaySystemError,
    WorkerCrashedError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
)


class Generator(Protocol):
    """What turns a request into chunks: the fleet, or one engine in the same process."""

    def generate(
        self, request: GenerationRequest, model: str, record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        """Chunks until one has a finish reason; all of it as one chunk where ``record.whole`` says so.

        ``model`` is the client's name for the adapter, for messages. Writes down in ``record`` where it ran.
        Raises InvalidRequest, EngineOverloaded, GenerationFailed, an AdapterError or ReplicaLost.
        """
        ...


class Fleet:
    """All LoraReplicas behind a Serve handle."""

    def __init__(self, handle: Any, tracer: Tracer | None = None) -> None:
        self._tracer = tracer or NoOpTracer()
        # Made here, so that the router and its news exist before the first request.
        self._handle = handle.options(stream=True, method_name="stream")
        self._responses: set[Any] = set()  # that are not complete
        self._stopped: set[Any] = set()  # of those, the ones that ``stop`` ended

    def stop(self) -> None:
        """End everything that is under way: its readers get an ApiError, ``server_stopping``."""
        for response in self._responses - self._stopped:
            self._stopped.add(response)
            response.cancel()

    async def generate(
        self, request: GenerationRequest, model: str, record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        """See ``Generator``. A request of which nothing was given out yet goes to another replica, twice at most,
        when its replica dies or has a full queue; but once only when its replica's engine breaks, which the request
        itself may have caused."""
        avoid: list[str] = []
        broken = 0
        for attempt in range(RETRIES + 1):
            started = False
            try:
                async with aclosing(self._attempt(request, model, avoid, record)) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except (EngineOverloaded, *_LOST, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _cancelled():
                    raise
                if started:
                    raise ReplicaLost("the replica that ran this request died", started=True) from error
                broken += isinstance(error, EngineDead)
                if broken == BROKEN_ENGINES:
                    raise ReplicaLost(
                        "the engines of two replicas stopped while they had this request", started=False
                    ) from error
                if attempt == RETRIES or len(set(avoid)) < len(avoid):  # or there is no other replica to try
                    if isinstance(error, EngineOverloaded):
                        raise
                    raise ReplicaLost("no replica answered: try again in a moment", started=False) from error

    async def _attempt(
        self, request: GenerationRequest, model: str, avoid: list[str], record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        handle = self._handle.options(multiplexed_model_id=request.adapter_digest or "")
        routing: dict[str, Any] = {"avoid": tuple(avoid), "trace": carried(record.span)}
        asked_ns = time.time_ns()
        response = handle.remote(request.to_dict(), record.whole, routing=routing)
        finished = routed = False
        self._responses.add(response)
        try:
            async for item in response:
                if not routed:
                    routed = True
                    self._routed(routing, asked_ns, record)
                if "error" in item:
                    finished = True
                    avoid.append(item["replica"])
                chunk = wire.decode(item, model)
                finished = chunk.finish_reason is not None
                if chunk.finish_reason == "abort":
                    raise _Cut("the replica stopped the request")
                yield chunk
            if not finished:
                raise _Cut("the stream ended without a last chunk")
        except (Exception, asyncio.CancelledError) as error:
            if response in self._stopped and not _cancelled():
                raise server_stopping() from error
            if isinstance(error, BackPressureError):
                raise EngineOverloaded(str(error)) from error
            raise
        finally:
            if not routed:
                self._routed(routing, asked_ns, record)
            self._responses.discard(response)
            self._stopped.discard(response)
            # Dropping a response does not stop the replica; only this does.
            if not finished:
                response.cancel()

    def _routed(self, routing: dict[str, Any], asked_ns: int, record: RequestRecord) -> None:
        """The router has written down in ``routing`` what it chose, unless it never came to that."""
        record.replica, record.reason = routing.get("replica", ""), routing.get("reason", "")
        if record.span.is_recording():
            route_span(self._tracer, record.span, asked_ns, routing)


def _cancelled() -> bool:
    """Whether this task was cancelled, as against a replica whose own task was."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0

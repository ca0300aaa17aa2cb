"""OpenTelemetry: where spans go, and how a trace crosses from a client to a gateway and on to a replica.

The API comes with Ray; the exporter is the extra ``tracing``. The provider is this application's own, not the
process's: what else runs in it has its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec

from opentelemetry import context, trace
from opentelemetry.trace import NoOpTracer, Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

REMEDY = "pip install 'lorafleet[tracing]'"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_W3C = TraceContextTextMapPropagator()  # traceparent and tracestate

logger = logging.getLogger("ray.serve")


class Tracing:
    """A tracer that exports over OTLP/HTTP in a thread of its own, or one that does nothing."""

    def __init__(self, endpoint: str | None, sample: float | None, instance: str) -> None:
        """endpoint: URL of a collector, to which ``/v1/traces`` is added; without one OpenTelemetry's environment
        variables say, and without those there is no tracing. sample: share of the requests without a traceparent that
        are traced; None leaves it to ``OTEL_TRACES_SAMPLER``. instance: this process's name.

        Raises ModuleNotFoundError, with the remedy, when ``endpoint`` is set and there is no exporter.
        """
        self.on = False
        self.tracer: Tracer = NoOpTracer()
        self._provider = None
        if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 (all of this takes its time to import)
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415
        except ModuleNotFoundError as error:
            message = f"{error.name} is not installed: {REMEDY}"
            if endpoint is not None:
                raise ModuleNotFoundError(f"tracing.endpoint is set, but {message}", name=error.name) from error
            logger.warning("no traces are sent to where the environment says: %s", message)
            return
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "lorafleet"}
        self._provider = TracerProvider(
            sampler=None if sample is None else ParentBasedTraceIdRatio(sample),
            resource=Resource.create({**named, "service.instance.id": instance}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer, self.on = self._provider.get_tracer("lorafleet"), True

    def close(self) -> None:
        """Send what is left. Takes as long as the collector does: call it in a thread."""
        if self._provider is not None:
            self._provider.shutdown()


def has_exporter() -> bool:
    """Whether this machine could export spans."""
    try:
        return find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:  # not even its parents
        return False


def carried(span: Span) -> dict[str, str]:
    """The span as W3C headers, for another process; nothing for one that is not recorded and has no parent."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, trace.set_span_in_context(span))
    return headers


def carried_in(headers: Mapping[str, str]) -> context.Context:
    """The context that W3C headers name. Headers that are none are as good as left out."""
    return _W3C.extract(dict(headers), context.Context())


class IncomingTrace:
    """ASGI middleware: what a request does is part of the trace that its ``traceparent`` names."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token = context.attach(carried_in(Headers(scope=scope)))
        try:
            await self._app(scope, receive, send)
        finally:
            context.detach(token)

"""What a gateway tells of each request: metrics, one line in the log, one span."""

from __future__ import annotations

import logging
import time

from opentelemetry.trace import NoOpTracer, SpanKind, Status, StatusCode, Tracer

from deployments.api.request_id import current_request_id
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.request_record import RequestRecord

logger = logging.getLogger("ray.serve")


class Telemetry:
    """``begin`` when a request comes, ``end`` when it is over; in between others fill in its record."""

    def __init__(self, metrics: RequestMetrics | None = None, tracer: Tracer | None = None) -> None:
        """Without ``metrics`` and ``tracer`` there is the line in the log."""
        self._metrics = metrics or RequestMetrics(0, 0)
        self._tracer = tracer or NoOpTracer()

    def begin(self, *, whole: bool) -> RequestRecord:
        """A request came. Its span is a child of what the task's OpenTelemetry context names."""
        record = RequestRecord(whole=whole, request_id=current_request_id())
        record.span = self._tracer.start_span("request", kind=SpanKind.SERVER, start_time=record.started_ns)
        self._metrics.open += 1
        return record

    def end(self, record: RequestRecord, status: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """It is over, with this HTTP status and these tokens. A second call does nothing."""
        if record.ended_at is not None:
            return
        record.ended_at = time.monotonic()
        record.status, record.prompt_tokens, record.completion_tokens = status, prompt_tokens, completion_tokens
        self._metrics.open -= 1
        self._metrics.count(record)
        if record.span.is_recording():
            self._close(record)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%d %s %.3f s", status, record.model or "-", record.total_s, extra=record.facts())

    def _close(self, record: RequestRecord) -> None:
        span, facts = record.span, record.facts()
        span.set_attributes({_ATTRIBUTES.get(name, f"lorafleet.{name}"): value for name, value in facts.items()})
        if record.status >= 500 or record.error:
            span.set_status(Status(StatusCode.ERROR, record.error))
        if record.ttft_s is not None:
            span.add_event("first token", timestamp=record.started_ns + int(record.ttft_s * 1e9))
        span.end(record.started_ns + int(record.total_s * 1e9))


_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "generation_id": "gen_ai.response.id",
    "status": "http.response.status_code",
}

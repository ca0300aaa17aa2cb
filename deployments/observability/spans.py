"""Spans below a request's own: the choice of a replica, and what became of it there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context

from deployments.observability.tracing import carried_in
from engine.request import GenerationChunk, GenerationRequest, Timings


@dataclass(slots=True)
class Progress:
    """The last chunk that a generation came to."""

    last: GenerationChunk | None = None


@contextmanager
def generation_span(
    tracer: Tracer, headers: Mapping[str, str], request: GenerationRequest, replica: str
) -> Iterator[Progress]:
    """Around one generation on a replica: a span with its phases as children, made when it is over. Nothing is done
    for each token. headers: what ``carried`` made of the caller's span."""
    progress = Progress()
    span = tracer.start_span("generate", carried_in(headers), SpanKind.INTERNAL)
    if not span.is_recording():
        yield progress
        return
    started = time.time_ns()
    span.set_attributes({"lorafleet.replica_id": replica, "gen_ai.response.id": request.request_id})
    if request.adapter_digest is not None:
        span.set_attribute("lorafleet.adapter_digest", request.adapter_digest)
    try:
        yield progress
    except Exception as error:
        span.set_status(Status(StatusCode.ERROR, type(error).__name__))  # its text may quote what a client wrote
        raise
    finally:
        last = progress.last
        if last is not None:
            counts = {"input": last.prompt_tokens, "output": last.completion_tokens}
            span.set_attributes({f"gen_ai.usage.{kind}_tokens": count for kind, count in counts.items()})
            if last.finish_reason is not None:
                span.set_attribute("lorafleet.finish_reason", last.finish_reason)
            if last.timings is not None:
                _phases(tracer, set_span_in_context(span), started, last.timings, steps=last.completion_tokens)
        span.end()


def _phases(tracer: Tracer, parent: Any, started_ns: int, spent: Timings, *, steps: int) -> None:
    """The phases one after the other, those that took any time."""
    for name, seconds in (
        ("adapter", spent.adapter_s),
        ("queue", spent.queue_s),
        ("prefill", spent.prefill_s),
        ("decode", spent.decode_s),
    ):
        if seconds > 0:
            span = tracer.start_span(name, parent, start_time=started_ns)
            started_ns += int(seconds * 1e9)
            if name == "decode":
                span.set_attribute("lorafleet.steps", steps - 1)
            span.end(started_ns)


def route_span(tracer: Tracer, parent: Any, started_ns: int, routing: Mapping[str, Any]) -> None:
    """The choice of a replica, once it is made. routing: what the router wrote down of it, if it came to that."""
    span = tracer.start_span("route", set_span_in_context(parent), start_time=started_ns)
    if "reason" in routing:
        span.set_attributes({"lorafleet.routing_reason": routing["reason"], "lorafleet.replica_id": routing["replica"]})
    else:
        span.set_status(Status(StatusCode.ERROR, "no replica"))
    if routing["avoid"]:
        span.set_attribute("lorafleet.avoid", list(routing["avoid"]))
    span.end(routing.get("chosen_ns"))

"""One request is one trace, from its client's traceparent to the phases on a replica; what clients write is in none."""

from __future__ import annotations

import sys
from itertools import pairwise

import httpx
import pytest
from opentelemetry.trace import StatusCode

from deployments.api.http_app import create_http_app
from deployments.fleet import Fleet
from deployments.observability.request_record import RequestRecord
from deployments.observability.tracing import IncomingTrace, Tracing, carried
from engine.request import GenerationRequest
from examples.demo.words import held_out_prompts

from .collector import Collector
from .test_fleet import LAST, PIECE, Handle

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = held_out_prompts(1)[0]


@pytest.fixture
async def traced(service):
    app = create_http_app(service)
    app.add_middleware(IncomingTrace)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def complete(http, headers=None, **changes):
    body = {"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes
    return await http.post("/v1/completions", json=body, headers=headers or {})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_tree_under_its_traceparent_with_real_times(traced, spans, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "acme=1", "x-request-id": "r-17"}
    assert (await complete(traced, headers, stream=stream)).status_code == 200
    made = {span.name: span for span in spans.get_finished_spans()}
    assert {"request", "generate", "prefill", "decode"} <= made.keys() <= {*made.keys(), "adapter", "queue"}
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE}
    assert all(span.context.trace_state.get("acme") == "1" for span in made.values())
    assert f"{made['request'].parent.span_id:016x}" == PARENT
    assert made["generate"].parent.span_id == made["request"].context.span_id
    phases = [made[name] for name in ("adapter", "queue", "prefill", "decode") if name in made]
    assert all(phase.parent.span_id == made["generate"].context.span_id for phase in phases)
    assert all(before.end_time == after.start_time for before, after in pairwise(phases))
    for outer, inner in (("request", "generate"), ("generate", phases[0].name)):
        assert made[outer].start_time <= made[inner].start_time
    assert phases[-1].end_time <= made["generate"].end_time <= made["request"].end_time
    (first,) = made["request"].events
    assert made["request"].start_time < first.timestamp < made["request"].end_time
    told = made["request"].attributes
    assert (told["gen_ai.request.model"], told["http.response.status_code"]) == ("shout", 200)
    assert told["lorafleet.client_request_id"] == "r-17" and len(told["lorafleet.adapter_digest"]) == 64
    assert told["gen_ai.usage.output_tokens"] == made["generate"].attributes["gen_ai.usage.output_tokens"] > 0


@pytest.mark.parametrize(("traceparent", "made"), [(None, True), ("garbage", True), (f"00-{TRACE}-{PARENT}-00", False)])
async def test_without_a_traceparent_a_trace_begins_and_one_that_is_not_sampled_is_not(
    traced, spans, traceparent, made
):
    headers = {} if traceparent is None else {"traceparent": traceparent}
    assert (await complete(traced, headers)).status_code == 200
    found = spans.get_finished_spans()
    assert bool(found) is made
    assert len({span.context.trace_id for span in found}) == made
    assert all(f"{span.context.trace_id:032x}" != TRACE for span in found)


async def test_errors_are_marked_and_name_no_more_than_their_code(traced, spans):
    assert (await complete(traced, model="sk-live-1234")).status_code == 404
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR and span.attributes["http.response.status_code"] == 404
    assert "sk-live" not in span.to_json()


async def test_no_span_has_what_a_client_wrote(traced, spans):
    secrets = {"prompt": "Zanzibar", "user": "ann@example.com", "stop": "Quito"}
    headers = {"authorization": "Bearer sk-secret", "x-adapter-token": "hf_secret"}
    for changes in ({}, {"max_tokens": 10**6}, {"stream": True}):
        await complete(traced, headers, **(secrets | changes))
    text = "".join(span.to_json() for span in spans.get_finished_spans())
    assert text and not [secret for secret in (*secrets.values(), "sk-secret", "hf_secret") if secret in text]


class RoutedHandle(Handle):
    """Writes down what it chose, as the router does."""

    def remote(self, request, whole, routing):
        self.traces = [*getattr(self, "traces", []), routing["trace"]]
        if self.script[0]:
            routing |= {"reason": "home", "replica": f"r{len(self.calls)}", "chosen_ns": 10**18}
        return super().remote(request, whole, routing)


async def test_each_choice_of_a_replica_is_a_span_and_the_replica_is_told_the_trace(tracer, spans):
    handle = RoutedHandle([ConnectionError()], [PIECE, LAST])
    record = RequestRecord(span=tracer.start_span("request"))
    request = GenerationRequest("r", (1, 2), adapter="local:/x", adapter_digest="d" * 64)
    fleet = Fleet(handle, tracer)
    with pytest.raises(ConnectionError):
        [chunk async for chunk in fleet.generate(request, "tenant", record)]
    assert [chunk async for chunk in fleet.generate(request, "tenant", record)] == [PIECE, LAST]
    assert handle.traces == [carried(record.span)] * 2 and handle.traces[0]["traceparent"]
    routes = spans.get_finished_spans()
    assert [span.attributes["lorafleet.replica_id"] for span in routes] == ["r0", "r1"]
    assert {span.parent.span_id for span in routes} == {record.span.get_span_context().span_id}
    assert {(span.name, span.attributes["lorafleet.routing_reason"], span.end_time) for span in routes} == {
        ("route", "home", 10**18)
    }
    assert (record.replica, record.reason) == ("r1", "home")


@pytest.fixture
def collector():
    with Collector() as listening:
        yield listening


@pytest.mark.parametrize("by", ["setting", "environment"])
def test_spans_go_to_a_collector_over_http(collector, monkeypatch, by):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if by == "environment":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    tracing = Tracing(collector.url if by == "setting" else None, 1.0, "replica-1")
    assert tracing.on
    tracing.tracer.start_span("request").end()
    tracing.close()
    ((path, sent),) = collector.got
    (of_resource,) = sent.resource_spans
    named = {one.key: one.value.string_value for one in of_resource.resource.attributes}
    assert path == "/v1/traces" and of_resource.scope_spans[0].spans[0].name == "request"
    assert (named["service.name"], named["service.instance.id"]) == ("lorafleet", "replica-1")


def test_a_sample_of_none_traces_nothing_that_is_not_traced_already(collector):
    tracing = Tracing(collector.url, 0.0, "replica-1")
    tracing.tracer.start_span("request").end()
    tracing.close()
    assert collector.got == []


def test_tracing_is_off_unless_asked_for_and_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    off = Tracing(None, None, "replica-1")
    assert not off.on and not off.tracer.start_span("request").is_recording()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ModuleNotFoundError, match=r"lorafleet\[tracing\]"):
        Tracing("http://localhost:4318", None, "replica-1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert not Tracing(None, None, "replica-1").on, "the environment may be meant for others"

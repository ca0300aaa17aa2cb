"""What the running server tells: numbers that Prometheus scrapes, one trace over all processes, one line a request."""

from __future__ import annotations

import json
from itertools import pairwise

from deployments.observability.catalog import METRICS
from examples.demo.words import answer, held_out_prompts

from .waiting import until

PROMPT = held_out_prompts(1)[0]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SELDOM = {  # what nothing here need bring about
    f"ray_lorafleet_{name}_total"
    for name in (
        *("requests_cut", "preemptions", "adapter_failures_repeated"),
        *("adapter_evictions", "adapter_prefetches", "adapter_load_failures"),
    )
}


def complete(http, headers=None, **changes):
    body = {"model": "shout", "prompt": PROMPT, "max_tokens": 80, "temperature": 0} | changes
    response = http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def series(server) -> dict[str, float]:
    lines = [line for line in server.metrics().splitlines() if line.startswith("ray_lorafleet_")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def total(scraped: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value
        for key, value in scraped.items()
        if key.partition("{")[0] == f"ray_{name}" and all(label in key for label in labels)
    )


def test_prometheus_finds_every_metric_and_requests_move_them(server, http):
    before = series(server)
    for stream in (False, True, True):
        complete(http, stream=stream)

    moved = [
        *((f"lorafleet_{name}_seconds_count", 3) for name in ("ttft", "request", "queue", "prefill", "adapter_wait")),
        *((f"lorafleet_{name}_seconds_sum", 1e-6) for name in ("ttft", "request", "queue", "prefill", "inter_token")),
        *((f"lorafleet_{name}_count", 10) for name in ("inter_token_seconds", "step_rows", "step_seconds")),
        ("lorafleet_routing_decisions_total", 3),
        ("lorafleet_tokens_total", 10, 'kind="generated"'),
        ("lorafleet_tenant_requests_total", 3, 'tenant=""', 'status="200"'),
        ("lorafleet_adapter_requests_total", 3, 'adapter="shout"', 'status="200"'),
    ]

    def unmoved() -> list[str]:
        now = series(server)
        grown = {name: total(now, name, *labels) - total(before, name, *labels) for name, _, *labels in moved}
        return [name for name, least, *_ in moved if grown[name] < least]

    until(unmoved, lambda names: not names)
    after = series(server)
    buckets = [total(after, "lorafleet_step_rows_bucket", f'le="{bound}"') for bound in ("1", "2", "4", "8", "+Inf")]
    assert all(low <= high for low, high in pairwise(buckets)) and buckets[-1] > 0

    parts = {"histogram": ("_bucket", "_sum", "_count")}
    expected = {f"ray_{one.name}{part}" for one in METRICS for part in parts.get(one.kind, ("",))}
    assert {key.partition("{")[0] for key in after} <= expected
    until(lambda: expected - {key.partition("{")[0] for key in series(server)}, lambda missing: missing <= SELDOM)


def test_one_request_is_one_trace_over_gateway_router_and_replica(server, http):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "acme=1"}
    assert complete(http, headers).json()["choices"][0]["text"] == answer(PROMPT, "shout")
    wanted = {"request", "route", "generate", "prefill", "decode"}
    spans = until(lambda: server.collector.spans(TRACE), lambda made: wanted <= {span.name for span in made})
    made = {span.name: span for span in spans}
    assert made["request"].parent_span_id.hex() == PARENT and made["generate"].trace_state == "acme=1"
    assert made["route"].parent_span_id == made["generate"].parent_span_id == made["request"].span_id
    assert made["prefill"].parent_span_id == made["decode"].parent_span_id == made["generate"].span_id
    assert made["request"].start_time_unix_nano <= made["route"].start_time_unix_nano
    assert made["route"].end_time_unix_nano <= made["decode"].end_time_unix_nano <= made["request"].end_time_unix_nano
    told = {one.key: one.value.string_value for one in made["route"].attributes}
    replicas = {span.name: {one.key: one.value.string_value for one in span.attributes} for span in spans}
    assert told["lorafleet.routing_reason"] in {"resident", "loading", "host_cached", "home", "spread", "least_loaded"}
    assert told["lorafleet.replica_id"] == replicas["generate"]["lorafleet.replica_id"]
    assert {PROMPT, answer(PROMPT, "shout")}.isdisjoint(str(spans).split('"'))


def test_the_request_id_that_the_client_has_is_in_the_lines_of_gateway_and_replica(server, http):
    response = complete(http, {"x-request-id": "look-for-me"})
    assert response.headers["x-request-id"] == "look-for-me"
    logs = server.folder / "ray" / "session_latest" / "logs" / "serve"

    def lines(deployment: str) -> list[dict]:
        texts = [file.read_text() for file in logs.glob(f"replica_*{deployment}*.log")]
        found = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
        return [line for line in found if line.get("request_id") == "look-for-me"]

    (line,) = until(lambda: [line for line in lines("Gateway") if "generation_id" in line])
    assert line["generation_id"] == response.json()["id"] and line["model"] == "shout" and line["status"] == 200
    assert line["completion_tokens"] == response.json()["usage"]["completion_tokens"]
    assert line["replica_id"] and line["routing_reason"] and 0 < line["ttft_s"] <= line["total_s"]
    assert any(line["replica_id"] in one["replica"] for one in until(lambda: lines("LoraReplica")))
    text = "".join(file.read_text() for file in logs.iterdir())
    assert PROMPT not in text and answer(PROMPT, "shout") not in text

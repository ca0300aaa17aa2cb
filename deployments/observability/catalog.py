"""Every metric there is: what it is called, what its labels are, what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Prometheus sees it as ``ray_<name>``, a histogram as ``ray_<name>_bucket``, ``_sum`` and ``_count``."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"lorafleet_{name}", "gauge", meaning, labels)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"lorafleet_{name}_total", "counter", meaning, labels)


def _histogram(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"lorafleet_{name}", "histogram", meaning, labels)


REPLICA = (
    _gauge("adapters", "Adapters held: in slots, in host memory, on disk (shared on a node).", "tier"),
    _gauge("adapter_bytes", "Bytes that these adapters take.", "tier"),
    _gauge("adapter_bytes_budget", "Bytes that they may take.", "tier"),
    _gauge("adapter_bytes_referenced", "Bytes in host memory that waiting requests, loads and copies use.", "tier"),
    _gauge("adapter_slots", "Adapter slots, used or not."),
    _gauge("adapter_slots_in_use", "Slots that running requests refer to."),
    _gauge("adapters_pinned", "Adapters that are kept in their slots."),
    _gauge("requests", "Requests: running, waiting, waiting_for_adapter.", "state"),
    _gauge("tenants_waiting", "Tenants with requests that wait for their turn."),
    _gauge("longest_wait_seconds", "How long the request that was queued first has waited so far."),
    _gauge("kv_pages", "KV pages: used, and free, those kept for prompts that begin alike among the free.", "state"),
    _gauge("adapter_failures_remembered", "Adapters and references that are answered with a failure for now."),
    _gauge("user_config_refused", "1 while the last user_config is not in force because of a mistake in it."),
    _counter("adapter_hits", "Look-ups that found their adapter: slot, host, disk.", "tier"),
    _counter("adapter_misses", "Look-ups that did not.", "tier"),
    _counter("adapter_evictions", "Adapters put out for others: slot, host.", "tier"),
    _counter("adapter_prefetches", "Adapters brought to a slot ahead of a request that could run."),
    _counter("adapter_loads", "Loads that succeeded: download, read, pack, slot (the copy to it).", "tier"),
    _counter("adapter_load_failures", "Loads that failed.", "tier"),
    _counter("adapter_load_bytes", "Bytes of the loads that succeeded.", "tier"),
    _counter("adapter_failures_repeated", "Requests answered with a remembered failure."),
    _counter("tokens", "Tokens: prompt and generated ones computed, reused ones found in pages.", "kind"),
    _counter("preemptions", "Requests that gave up their KV pages to be computed again."),
    _histogram("adapter_load_seconds", "How long loads took, done or failed.", "tier"),
    _histogram("adapter_wait_seconds", "From a request's arrival until its adapter was at hand."),
    _histogram("queue_seconds", "From then until the request's first step."),
    _histogram("prefill_seconds", "From a request's first step until its first token."),
    _histogram("inter_token_seconds", "Between two tokens of one request."),
    _histogram("step_seconds", "From one step's result to the next while there is work."),
    _histogram("step_rows", "Rows of a step."),
)

ARRIVALS = _counter(
    "arrivals", "Requests for adapters: why they were sent here, and where the adapter was then.", "reason", "found"
)

GATEWAY = (
    _gauge("requests_open", "Requests that a gateway has begun to answer."),
    _counter("adapter_requests", "Requests that ended.", "adapter", "status"),
    _counter("adapter_tokens", "Tokens of requests that ended.", "adapter", "kind"),
    _counter("tenant_requests", "Requests that ended.", "tenant", "status"),
    _counter("tenant_tokens", "Tokens of requests that ended.", "tenant", "kind"),
    _counter("requests_cut", "Requests answered with 200 that did not get to their end.", "reason"),
    _histogram("ttft_seconds", "From a request's arrival at a gateway until its first token."),
    _histogram("request_seconds", "From a request's arrival at a gateway until its end."),
)

ROUTING_DECISIONS = _counter(
    "routing_decisions", "Requests given to a replica, by the reason for choosing it.", "reason"
)
NEWS_DELAY = _histogram(
    "routing_news_delay_seconds",
    "From a change at a replica until a router of this process knew it, by both machines' clocks.",
)
NEWS_AGE = _gauge("routing_news_age_seconds", "Since a router of this process last heard from the hub, news or not.")

METRICS = (*REPLICA, ARRIVALS, *GATEWAY, ROUTING_DECISIONS, NEWS_DELAY, NEWS_AGE)

"""What a replica tells Prometheus, through Ray: read from the engine's and the store's statistics now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray.serve import metrics

from adapter_store.load_stats import SECONDS_BOUNDS, LoadTotals
from deployments.background import end
from engine.engine import Engine

PERIOD_SECONDS = 2.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Reading:
    """Numbers of one moment, by (metric, tag value); the tag is ``tier``, ``kind`` or none, as METRICS has it."""

    now: dict[tuple[str, str], float]
    totals: dict[tuple[str, str], float]
    loads: dict[str, LoadTotals]


# name -> (tag, what it is). Prometheus sees them as ray_<name>, with replica, deployment and application.
GAUGES = {
    "lorafleet_adapters": (
        "tier",
        "Adapters held: in slots, in host memory, on disk (what the replicas of a node share).",
    ),
    "lorafleet_adapter_bytes": ("tier", "Bytes that these adapters take."),
    "lorafleet_adapter_bytes_budget": ("tier", "Bytes that they may take."),
    "lorafleet_adapter_bytes_referenced": ("tier", "Bytes in host memory that waiting requests, loads and copies use."),
    "lorafleet_adapter_slots_in_use": ("", "Slots that running requests refer to."),
    "lorafleet_adapters_pinned": ("", "Adapters that are kept in their slots."),
    "lorafleet_requests": ("state", "Requests: running, waiting, waiting_for_adapter."),
    "lorafleet_tenants_waiting": ("", "Tenants with requests that wait for their turn."),
    "lorafleet_adapter_failures_remembered": ("", "Adapters and references that are answered with a failure for now."),
    "lorafleet_user_config_refused": ("", "1 while the last user_config is not in force because of a mistake in it."),
}
COUNTERS = {
    "lorafleet_adapter_hits_total": ("tier", "Look-ups that found their adapter: slot, host, disk."),
    "lorafleet_adapter_misses_total": ("tier", "Look-ups that did not."),
    "lorafleet_adapter_evictions_total": ("tier", "Adapters put out for others: slot, host."),
    "lorafleet_adapter_prefetches_total": ("", "Adapters brought to a slot ahead of a request that could run."),
    "lorafleet_adapter_loads_total": ("tier", "Loads that succeeded: download, read, pack, slot (the copy to it)."),
    "lorafleet_adapter_load_failures_total": ("tier", "Loads that failed."),
    "lorafleet_adapter_load_bytes_total": ("tier", "Bytes of the loads that succeeded."),
    "lorafleet_adapter_loading_seconds_total": ("tier", "Seconds that loads took, done or failed."),
    "lorafleet_adapter_failures_repeated_total": ("", "Requests answered with a remembered failure."),
    "lorafleet_tokens_total": ("kind", "Tokens computed: prompt, generated; reused ones were not."),
    "lorafleet_preemptions_total": ("", "Requests that gave up their KV pages to be computed again."),
}
LOAD_SECONDS = "lorafleet_adapter_load_seconds"


def read(engine: Engine, *, refused: bool) -> Reading:
    """The numbers of now."""
    stats, parts = engine.stats(), engine.parts
    now: dict[tuple[str, str], float] = {
        ("lorafleet_adapters", "slot"): len(stats.resident),
        ("lorafleet_adapters", "host"): len(stats.host_cached),
        ("lorafleet_adapter_slots_in_use", ""): stats.slots_in_use,
        ("lorafleet_adapters_pinned", ""): len(stats.pinned),
        ("lorafleet_adapter_bytes", "host"): stats.host_bytes,
        ("lorafleet_adapter_bytes_budget", "host"): stats.host_budget_bytes,
        ("lorafleet_adapter_bytes_referenced", "host"): stats.host_referenced_bytes,
        ("lorafleet_tenants_waiting", ""): stats.waiting_tenants,
        ("lorafleet_requests", "running"): stats.running,
        ("lorafleet_requests", "waiting"): stats.waiting,
        ("lorafleet_requests", "waiting_for_adapter"): stats.waiting_for_adapter,
        ("lorafleet_user_config_refused", ""): refused,
    }
    totals: dict[tuple[str, str], float] = {
        ("lorafleet_adapter_hits_total", "slot"): stats.slot_hits,
        ("lorafleet_adapter_misses_total", "slot"): stats.slot_misses,
        ("lorafleet_adapter_evictions_total", "slot"): stats.slot_evictions,
        ("lorafleet_adapter_prefetches_total", ""): stats.prefetches,
        ("lorafleet_tokens_total", "prompt"): stats.prompt_tokens,
        ("lorafleet_tokens_total", "generated"): stats.generated_tokens,
        ("lorafleet_tokens_total", "reused"): stats.reused_tokens,
        ("lorafleet_preemptions_total", ""): stats.preemptions,
    }
    if parts.store is None or parts.slots is None:
        return Reading(now, totals, {})
    store, slots = parts.store.stats(), parts.slots.stats()
    sources, host = store.sources, store.host
    now |= {
        ("lorafleet_adapters", "disk"): store.disk.adapters,
        ("lorafleet_adapter_bytes", "disk"): store.disk.bytes,
        ("lorafleet_adapter_bytes_budget", "disk"): store.disk.budget_bytes,
        ("lorafleet_adapter_bytes", "slot"): slots.bytes,
        ("lorafleet_adapter_bytes_budget", "slot"): slots.capacity_bytes,
        ("lorafleet_adapter_failures_remembered", ""): sources.remembered_failures,
    }
    totals |= {
        ("lorafleet_adapter_hits_total", "host"): host.hits,
        ("lorafleet_adapter_misses_total", "host"): host.misses,
        ("lorafleet_adapter_evictions_total", "host"): host.evictions,
        ("lorafleet_adapter_hits_total", "disk"): sources.disk_hits,
        ("lorafleet_adapter_misses_total", "disk"): sources.disk_misses,
        ("lorafleet_adapter_failures_repeated_total", ""): sources.failures_repeated,
    }
    loads = {"download": sources.download, "read": sources.read, "pack": store.pack, "slot": slots.copies}
    for tier, load in loads.items():
        totals[("lorafleet_adapter_loads_total", tier)] = load.done
        totals[("lorafleet_adapter_load_failures_total", tier)] = load.failed
        totals[("lorafleet_adapter_load_bytes_total", tier)] = load.bytes
        totals[("lorafleet_adapter_loading_seconds_total", tier)] = load.seconds
    return Reading(now, totals, loads)


def durations(before: LoadTotals, after: LoadTotals) -> Iterator[float]:
    """Seconds to observe for what was done between two readings: those of one bucket as their mean, so that buckets and
    sum are exact."""
    buckets = zip(before.by_seconds, after.by_seconds, before.spent, after.spent, strict=True)
    for count_before, count, spent_before, spent in buckets:
        new = count - count_before
        yield from [(spent - spent_before) / new] * new if new else ()


class ReplicaMetrics:
    """Publishes a reading every ``PERIOD_SECONDS``, which costs no request anything: a slow disk holds up a thread."""

    def __init__(self, engine: Engine, refused: Callable[[], str | None]) -> None:
        """Call it on the running loop of a Serve replica. refused: why a ``user_config`` is not in force."""
        self._engine = engine
        self._refused = refused
        self._last = Reading({}, {}, {})
        self._tags = {name: tag for name, (tag, _) in (GAUGES | COUNTERS).items()}
        self._gauges = {name: metrics.Gauge(name, what, _keys(tag)) for name, (tag, what) in GAUGES.items()}
        self._counters = {name: metrics.Counter(name, what, _keys(tag)) for name, (tag, what) in COUNTERS.items()}
        # Ray's exporter makes a histogram's sum from the buckets, so there is a counter of the seconds too.
        what = "How long loads took, done or failed."
        self._seconds = metrics.Histogram(LOAD_SECONDS, what, list(SECONDS_BOUNDS), ("tier",))
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop publishing."""
        await end(self._task)

    def publish(self, reading: Reading) -> None:
        """Pass a reading on to Ray: what is now, and what came since the last one."""
        for (name, value), number in reading.now.items():
            self._gauges[name].set(number, self._labels(name, value))
        for (name, value), total in reading.totals.items():
            grown = total - self._last.totals.get((name, value), 0)
            if grown > 0:
                self._counters[name].inc(grown, self._labels(name, value))
        for tier, load in reading.loads.items():
            for seconds in durations(self._last.loads.get(tier, LoadTotals()), load):
                self._seconds.observe(seconds, {"tier": tier})
        self._last = reading

    def _labels(self, name: str, value: str) -> dict[str, str]:
        return {self._tags[name]: value} if self._tags[name] else {}

    async def _run(self) -> None:
        while True:
            try:
                refused = self._refused() is not None
                self.publish(await asyncio.to_thread(read, self._engine, refused=refused))
            except Exception:  # metrics must not be what stops a replica
                logger.exception("metrics could not be published")
            await asyncio.sleep(PERIOD_SECONDS)


def _keys(tag: str) -> Any:
    return (tag,) if tag else ()  # Serve's annotation says a tuple of one, its code takes any number

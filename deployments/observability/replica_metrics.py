"""What a replica tells Prometheus: the statistics of its engine and its store."""

from __future__ import annotations

from adapter_store.load_stats import SECONDS_BOUNDS
from deployments.observability.publisher import Reading
from engine.engine import Engine
from engine.histogram import Distribution

PERIOD_SECONDS = 2.0


def read(engine: Engine, *, refused: bool) -> Reading:
    """The numbers of now. Looks at the disk, so call it in a thread. refused: whether a ``user_config`` is."""
    stats, meter = engine.stats(), engine.meter
    reading: Reading = {
        ("lorafleet_adapters", "slot"): len(stats.resident),
        ("lorafleet_adapters", "host"): len(stats.host_cached),
        ("lorafleet_adapter_slots_in_use",): stats.slots_in_use,
        ("lorafleet_adapters_pinned",): len(stats.pinned),
        ("lorafleet_adapter_bytes", "host"): stats.host_bytes,
        ("lorafleet_adapter_bytes_budget", "host"): stats.host_budget_bytes,
        ("lorafleet_adapter_bytes_referenced", "host"): stats.host_referenced_bytes,
        ("lorafleet_tenants_waiting",): stats.waiting_tenants,
        ("lorafleet_longest_wait_seconds",): stats.longest_wait_s,
        ("lorafleet_requests", "running"): stats.running,
        ("lorafleet_requests", "waiting"): stats.waiting,
        ("lorafleet_requests", "waiting_for_adapter"): stats.waiting_for_adapter,
        ("lorafleet_kv_pages", "used"): stats.num_pages - stats.free_pages,
        ("lorafleet_kv_pages", "free"): stats.free_pages,
        ("lorafleet_user_config_refused",): refused,
        ("lorafleet_adapter_hits_total", "slot"): stats.slot_hits,
        ("lorafleet_adapter_misses_total", "slot"): stats.slot_misses,
        ("lorafleet_adapter_evictions_total", "slot"): stats.slot_evictions,
        ("lorafleet_adapter_prefetches_total",): stats.prefetches,
        ("lorafleet_tokens_total", "prompt"): stats.prompt_tokens,
        ("lorafleet_tokens_total", "generated"): stats.generated_tokens,
        ("lorafleet_tokens_total", "reused"): stats.reused_tokens,
        ("lorafleet_preemptions_total",): stats.preemptions,
        ("lorafleet_adapter_wait_seconds",): meter.adapter_seconds.read(),
        ("lorafleet_queue_seconds",): meter.queue_seconds.read(),
        ("lorafleet_prefill_seconds",): meter.prefill_seconds.read(),
        ("lorafleet_inter_token_seconds",): meter.inter_token_seconds.read(),
        ("lorafleet_step_seconds",): meter.step_seconds.read(),
        ("lorafleet_step_rows",): meter.step_rows.read(),
    }
    return reading | _of_adapters(engine)


def _of_adapters(engine: Engine) -> Reading:
    parts = engine.parts
    if parts.store is None or parts.slots is None:
        return {}
    store, slots = parts.store.stats(), parts.slots.stats()
    sources, host = store.sources, store.host
    reading: Reading = {
        ("lorafleet_adapter_slots",): len(parts.slots),
        ("lorafleet_adapters", "disk"): store.disk.adapters,
        ("lorafleet_adapter_bytes", "disk"): store.disk.bytes,
        ("lorafleet_adapter_bytes_budget", "disk"): store.disk.budget_bytes,
        ("lorafleet_adapter_bytes", "slot"): slots.bytes,
        ("lorafleet_adapter_bytes_budget", "slot"): slots.capacity_bytes,
        ("lorafleet_adapter_failures_remembered",): sources.remembered_failures,
        ("lorafleet_adapter_hits_total", "host"): host.hits,
        ("lorafleet_adapter_misses_total", "host"): host.misses,
        ("lorafleet_adapter_evictions_total", "host"): host.evictions,
        ("lorafleet_adapter_hits_total", "disk"): sources.disk_hits,
        ("lorafleet_adapter_misses_total", "disk"): sources.disk_misses,
        ("lorafleet_adapter_failures_repeated_total",): sources.failures_repeated,
    }
    loads = {"download": sources.download, "read": sources.read, "pack": store.pack, "slot": slots.copies}
    for tier, load in loads.items():
        reading["lorafleet_adapter_loads_total", tier] = load.done
        reading["lorafleet_adapter_load_failures_total", tier] = load.failed
        reading["lorafleet_adapter_load_bytes_total", tier] = load.bytes
        reading["lorafleet_adapter_load_seconds", tier] = Distribution(SECONDS_BOUNDS, load.by_seconds, load.seconds)
    return reading

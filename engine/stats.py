"""What an engine reports about itself."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TENANTS = 32


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What weighs on an engine now; cheap enough to be read many times a second.

    running, waiting: requests, those that wait for their adapter among the latter. ranks: sum of the ranks of the
    running requests' adapters. free_slots: (rank class, slots that are empty or hold an adapter that may go now).
    """

    running: int
    waiting: int
    ranks: int
    free_slots: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's picture. Counts of requests, pages and adapters are of now, the others are totals since the start.

    resident and host_cached: adapter digests in slots and in host memory. slots_in_use: slots that requests refer to.
    waiting_for_adapter: not in waiting. longest_wait_s: how long the one in waiting that was queued first has waited so
    far. waiting_tenants: tenants with requests in waiting; waiting_by_tenant: how many of each, of the ``MOST_TENANTS``
    with most. host_bytes: taken in host memory, of host_budget_bytes; host_referenced_bytes: of those, what waiting
    requests, loads and copies use. pinned: digests of pinned adapters.
    prefetches: adapters brought to a slot before a request could run, or without one.
    residency_version grows whenever ``resident`` changes. last_step_seconds: wall time of the last step, 0 before
    the first. reused_tokens: tokens that were not computed because pages held their keys and values already.
    """

    healthy: bool
    running: int
    waiting: int
    waiting_for_adapter: int
    longest_wait_s: float
    waiting_tenants: int
    waiting_by_tenant: tuple[tuple[str, int], ...]
    num_pages: int
    free_pages: int
    resident: tuple[str, ...]
    residency_version: int
    host_cached: tuple[str, ...]
    host_bytes: int
    host_referenced_bytes: int
    host_budget_bytes: int
    pinned: tuple[str, ...]
    prefetches: int
    slots_in_use: int
    slot_hits: int
    slot_misses: int
    slot_evictions: int
    preemptions: int
    reused_tokens: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    last_step_seconds: float

"""What an engine reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's picture. Counts of requests, pages and adapters are of now, the others are totals since the start.

    resident and host_cached: adapter digests in slots and in host memory. slots_in_use: slots that requests refer to.
    residency_version grows whenever ``resident`` changes. last_step_seconds: wall time of the last step, 0 before
    the first. reused_tokens: tokens that were not computed because pages held their keys and values already.
    """

    healthy: bool
    running: int
    waiting: int
    waiting_for_adapter: int
    num_pages: int
    free_pages: int
    resident: tuple[str, ...]
    residency_version: int
    host_cached: tuple[str, ...]
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

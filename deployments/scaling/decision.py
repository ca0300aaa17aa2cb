"""How many replicas a fleet should have: a pure function of what its replicas say of themselves.

It knows neither Ray nor a clock: the same arguments always give the same answer. ``autoscaling`` hangs it into Serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil


class Signal(StrEnum):
    """What a decision came from."""

    ROWS = "rows"  # requests, running and waiting, for the rows there are
    WAIT = "wait"  # how long a request waits for a row or a slot
    SLOTS = "slots"  # adapter slots that running requests refer to
    LOADING = "loading"  # adapters that come and go
    IDLE = "idle"  # there is nothing to do at all
    STEADY = "steady"  # the size is right


@dataclass(frozen=True, slots=True)
class ReplicaPressure:
    """One replica's word, as a mean over some seconds.

    rows: requests there, running and waiting, of max_rows that one step can hold. wait_s: how long the request that
    waits longest for a row or a slot has waited. slots_used: share of its adapter slots that requests refer to.
    loading: adapters brought to slots, as a share of what its copy path can do.
    """

    rows: float = 0.0
    max_rows: float = 1.0
    wait_s: float = 0.0
    slots_used: float = 0.0
    loading: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """What a replica should carry.

    target_rows: requests as a share of its rows; target_wait_s, target_slots, target_loading: as ``ReplicaPressure``
    has them. More than one of these asks for replicas; with ``slack`` below all of them there may be fewer.
    cooldown_s: how long a size is not tried again that was too small although it had rows to spare.
    """

    target_rows: float = 0.7
    target_wait_s: float = 1.0
    target_slots: float = 0.9
    target_loading: float = 0.5
    slack: float = 0.25
    cooldown_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("target_rows", "target_wait_s", "target_slots", "target_loading"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be more than 0")
        if not 0.05 <= self.slack < 1:  # without a gap between the two limits the size would go up and down
            raise ValueError(f"slack is {self.slack!r} but must be from 0.05 to below 1")
        if self.cooldown_s < 0:
            raise ValueError(f"cooldown_s is {self.cooldown_s!r} but must be at least 0")


@dataclass(frozen=True, slots=True)
class ScalingMemory:
    """What one decision leaves for the next.

    target: the size that was aimed at. cause: what asks for more than that. demand: requests at that time. too_small:
    a size that was given up for another reason than its rows, with ``too_small_demand`` requests; since: when, or when
    one less was allowed last.
    """

    target: int = 0
    cause: Signal = Signal.STEADY
    demand: float = 0.0
    too_small: int = 0
    too_small_demand: float = 0.0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """How many replicas there should be, why, and what the next decision has to know."""

    replicas: int
    signal: Signal
    memory: ScalingMemory


def decide(
    policy: ScalingPolicy,
    reports: Sequence[ReplicaPressure],
    *,
    running: int,
    target: int,
    requests: float,
    now: float,
    memory: ScalingMemory | None = None,
) -> ScalingDecision:
    """The size that fits what there is to do; whoever asks bounds it and waits until the answer has lasted.

    running: replicas that run, of which ``reports`` came. target: the size aimed at now. requests: under way to
    replicas or with them, as the callers count them. now: seconds on any clock.

    Every signal is scaled to the size at which it would be at its target, and the largest size counts: at most twice
    the replicas that run, because nobody knows what comes after them. Fewer replicas are asked for where even those
    would be ``slack`` below every target, so a change by itself never asks for its opposite. Only rows follow from the
    number of requests; a size whose other signals were too high is not gone back to for ``cooldown_s``, and one size a
    ``cooldown_s`` then, unless there is half as much to do.
    """
    memory = _remember(memory or ScalingMemory(), target, now)
    demand = max(sum(one.rows for one in reports), requests)
    if demand < memory.too_small_demand / 2:
        memory = replace(memory, too_small=0)
    elif memory.too_small and now - memory.since >= policy.cooldown_s:
        memory = replace(memory, too_small=memory.too_small - 1, since=now)  # that one size is tried again
    if running == 0 or not reports:
        return ScalingDecision(target, Signal.STEADY, memory)
    sizes = _sizes(policy, reports, running, demand)
    signal = max(sizes, key=lambda one: sizes[one])
    needed, wait = sizes[signal], sizes[Signal.WAIT] / running
    enough = max(size for one, size in sizes.items() if one != Signal.WAIT) / (1 - policy.slack)
    wanted = target
    if needed > running:
        wanted = max(target, min(ceil(needed), max(2 * running, running + 1)))
    elif len(reports) == running:  # of one that is starting nobody knows yet what it changes
        if demand == 0 and enough == 0 and wait == 0:
            wanted, signal = 0, Signal.IDLE
        elif ceil(enough) < running and wait <= (1 - policy.slack) / 2:
            wanted = min(target, max(ceil(enough), 1, memory.too_small + 1))
    if wanted == target:
        signal = Signal.STEADY
    cause = signal if wanted > target else Signal.STEADY
    return ScalingDecision(wanted, signal, replace(memory, target=target, cause=cause, demand=demand))


def _remember(memory: ScalingMemory, target: int, now: float) -> ScalingMemory:
    """Note the size that was given up since, if that was for another reason than its rows."""
    if target <= memory.target or memory.cause in (Signal.ROWS, Signal.STEADY) or memory.target == 0:
        return memory
    return replace(memory, too_small=memory.target, too_small_demand=memory.demand, since=now)


def _sizes(
    policy: ScalingPolicy, reports: Sequence[ReplicaPressure], running: int, demand: float
) -> dict[Signal, float]:
    """For each signal, how many replicas like these would bring it to its target."""
    scale = running / len(reports)
    rows_each = sum(one.max_rows for one in reports) / len(reports)
    return {
        Signal.ROWS: demand / (policy.target_rows * rows_each),
        Signal.SLOTS: scale * sum(one.slots_used for one in reports) / policy.target_slots,
        Signal.LOADING: scale * sum(one.loading for one in reports) / policy.target_loading,
        Signal.WAIT: scale * sum(one.wait_s for one in reports) / policy.target_wait_s,
    }

"""The size of the fleet: what asks for more, what allows less, and that one never follows from the other."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.scaling.decision import ReplicaPressure, ScalingMemory, ScalingPolicy, Signal, decide

POLICY = ScalingPolicy()
CALM = ReplicaPressure(rows=20, max_rows=32, wait_s=0.1, slots_used=0.3, loading=0.1)

pressures = st.builds(
    ReplicaPressure,
    rows=st.floats(0, 400),
    max_rows=st.sampled_from([8.0, 64.0, 256.0]),
    wait_s=st.floats(0, 60),
    slots_used=st.floats(0, 1),
    loading=st.floats(0, 8),
)
policies = st.builds(
    ScalingPolicy,
    target_rows=st.floats(0.05, 4),
    target_wait_s=st.floats(0.01, 30),
    target_slots=st.floats(0.1, 1),
    target_loading=st.floats(0.05, 2),
    slack=st.floats(0.05, 0.9),
)


def size(reports, policy=POLICY, *, requests=0.0, target=None, memory=None, now=0.0, running=None):
    running = len(reports) if running is None else running
    target = running if target is None else target
    return decide(policy, reports, running=running, target=target, requests=requests, now=now, memory=memory)


# -- what asks for more --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "changes"),
    [
        (Signal.ROWS, {"rows": 32.0}),
        (Signal.WAIT, {"wait_s": 1.5}),
        (Signal.SLOTS, {"slots_used": 1.0}),
        (Signal.LOADING, {"loading": 0.6}),
    ],
)
def test_each_signal_alone_asks_for_replicas_and_says_so(signal, changes):
    calm = size([CALM] * 3)
    assert calm.replicas == 3 and calm.signal == Signal.STEADY
    pressed = size([replace(CALM, **changes)] * 3)
    assert pressed.replicas > 3 and pressed.signal == signal


def test_requests_that_no_replica_has_taken_count():
    assert size([CALM] * 3, requests=32 * 0.7 * 5).replicas == 5


@given(st.lists(pressures, min_size=1, max_size=20), policies, st.floats(0, 5000))
def test_at_most_twice_the_replicas_that_run(reports, policy, requests):
    running = len(reports)
    assert 0 <= size(reports, policy, requests=requests).replicas <= max(2 * running, running + 1)


@given(
    st.lists(pressures, min_size=1, max_size=20),
    policies,
    st.sampled_from(["rows", "wait_s", "slots_used", "loading"]),
    st.floats(0, 100),
)
def test_more_pressure_never_asks_for_less(reports, policy, field, more):
    pressed = [replace(one, **{field: getattr(one, field) + more}) for one in reports]
    assert size(pressed, policy).replicas >= size(reports, policy).replicas


@given(st.lists(pressures, min_size=1, max_size=20), policies)
def test_who_says_what_does_not_matter(reports, policy):
    assert size(reports, policy).replicas == size(reports[::-1], policy).replicas


def test_replicas_of_several_sizes_are_counted_by_their_rows():
    """Two of 64 rows and two of 16 carry what 160 rows carry."""
    mixed = [ReplicaPressure(rows=60, max_rows=64)] * 2 + [ReplicaPressure(rows=15, max_rows=16)] * 2
    assert size(mixed).replicas == ceil(150 / (0.7 * 40))


# -- what allows less ----------------------------------------------------------------------------------------


def test_a_fleet_with_little_to_do_shrinks_to_what_carries_it_with_slack():
    assert size([replace(CALM, rows=4.0, slots_used=0.1, loading=0.01)] * 8).replicas == ceil(32 / (0.7 * 32 * 0.75))


@pytest.mark.parametrize("changes", [{"wait_s": 0.5}, {"slots_used": 0.7}, {"loading": 0.4}])
def test_rows_alone_do_not_shrink_it(changes):
    quiet = ReplicaPressure(rows=2, max_rows=32)
    assert size([quiet] * 4).replicas == 1
    assert size([replace(quiet, **changes)] * 4).replicas == 4


def test_only_nothing_at_all_asks_for_none():
    idle = ReplicaPressure(max_rows=32)
    assert (size([idle]).replicas, size([idle]).signal) == (0, Signal.IDLE)
    assert size([idle], requests=0.01).replicas == 1
    for field in ("rows", "wait_s", "slots_used", "loading"):
        assert size([replace(idle, **{field: 0.01})]).replicas == 1, field


def test_nothing_is_decided_from_replicas_that_have_not_reported():
    assert size([], running=0, target=0).replicas == 0
    assert size([], running=0, target=2).replicas == 2
    assert size([], running=3).replicas == 3
    assert size([ReplicaPressure(max_rows=32)], running=2).replicas == 2, "the other may be full"
    assert size([replace(CALM, rows=64)], running=2).replicas > 2, "but one may ask for more"


def test_what_is_starting_is_neither_called_off_nor_asked_for_twice():
    busy = [replace(CALM, rows=40)] * 2
    assert size(busy, target=4).replicas == 4
    assert size([CALM] * 2, target=4).replicas == 4
    assert size([ReplicaPressure(max_rows=32)] * 2, target=4).replicas == 0, "unless there is nothing to do"


# -- neither follows from the other --------------------------------------------------------------------------


@given(policies, st.floats(0.01, 1e5), st.integers(1, 300), st.sampled_from([8.0, 64.0]))
def test_a_size_that_was_asked_for_is_kept_under_the_same_load(policy, demand, running, max_rows):
    """Whatever the load, the size settles after going in one direction, and stays."""

    def asked(count):
        return size([ReplicaPressure(rows=demand / count, max_rows=max_rows)] * count, policy).replicas

    sizes = [running]
    while len(sizes) < 40 and (following := asked(sizes[-1])) != sizes[-1] and following <= 4096:
        sizes.append(following)
    assert sizes in (sorted(sizes), sorted(sizes, reverse=True))
    assert len(sizes) < 40


class Fleet:
    """A fleet in which every answer of ``decide`` is carried out once it has lasted, as Serve does it."""

    def __init__(self, policy, up_delay, down_delay, wait):
        self.policy, self.wait = policy, wait
        self.delays = {1: up_delay, -1: down_delay}
        self.size, self.memory = 1, None
        self.direction, self.since = 0, 0.0
        self.changes = []  # (when, from, to, demand, signal)

    def at(self, now, demand):
        wait = self.wait(demand, self.size)
        report = ReplicaPressure(rows=demand / self.size, max_rows=32, wait_s=wait)
        made = size([report] * self.size, self.policy, memory=self.memory, now=now)
        self.memory = made.memory
        wanted = min(max(made.replicas, 1), 64)
        direction = (wanted > self.size) - (wanted < self.size)
        if direction != self.direction:
            self.direction, self.since = direction, now
        if direction and now - self.since >= self.delays[direction]:
            self.changes.append((now, self.size, wanted, demand, made.signal))
            self.size, self.direction = wanted, 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 900), st.integers(1, 60)), min_size=1, max_size=15),
    st.sampled_from([0.0, 5.0, 30.0]),
    st.sampled_from([0.0, 30.0, 300.0]),
    st.floats(0.05, 0.6),
)
def test_the_size_turns_round_only_after_the_load_has(trace, up_delay, down_delay, slack):
    """Over any load: more replicas come after fewer only for a load that grew by the slack, and the other way round."""
    fleet = Fleet(ScalingPolicy(slack=slack), up_delay, down_delay, lambda demand, size: 0.0)
    now = 0.0
    for demand, ticks in trace:
        for _ in range(ticks):
            fleet.at(now, demand)
            now += 2.0
    for (_, *before), (_, *after) in zip(fleet.changes, fleet.changes[1:], strict=False):
        went, goes = (change[1] > change[0] for change in (before, after))
        if went and not goes:
            assert after[2] < before[2]
        if goes and not went:
            assert after[2] > before[2] / (1 - slack) * (1 - 1e-9) or before[2] == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(5, 60), st.sampled_from([400.0, 600.0]), st.integers(0, 5))
def test_a_wait_that_only_more_replicas_end_is_tried_out_once_a_cool_down(enough, demand, cooldown_s, jitter):
    """Requests wait whenever there are fewer than so many replicas, though rows are free: for their slots, say."""
    policy = ScalingPolicy(target_rows=8.0, cooldown_s=cooldown_s)
    fleet = Fleet(policy, 4.0, 20.0, lambda demand, size: 5.0 if size < enough else 0.0)
    seconds = 2000
    for tick in range(seconds // 2):
        fleet.at(2.0 * tick, demand + (tick * 7919 % (jitter + 1)))
    tries = [(when, size) for when, before, size, *_ in fleet.changes if size < min(enough, before)]
    early = [size for when, size in tries if when < cooldown_s]
    assert early == sorted(set(early)), "while the size is found, none is tried twice"
    late = [size for when, size in tries if when >= cooldown_s]
    assert 1 <= len(late) <= seconds / cooldown_s
    assert set(late) == {enough - 1}, "afterwards the one below, once a cool-down"


def test_a_size_that_was_too_small_is_gone_back_to_when_there_is_half_as_much_to_do():
    policy = ScalingPolicy(cooldown_s=inf)
    memory = size([replace(CALM, wait_s=3.0)] * 2, policy).memory  # with 40 requests
    calm = [ReplicaPressure(rows=0, max_rows=320)]
    assert size(calm * 4, policy, requests=20, memory=memory, now=1e9).replicas == 3
    assert size(calm * 4, policy, requests=19, memory=memory, now=1.0).replicas == 1


def test_a_target_that_is_none_is_refused_by_name():
    for name in ("target_rows", "target_wait_s", "target_slots", "target_loading"):
        with pytest.raises(ValueError, match=f"{name} is 0 but must be more than 0"):
            ScalingPolicy(**{name: 0})
    with pytest.raises(ValueError, match=r"slack is 1\.0 but must be from 0\.05 to below 1"):
        ScalingPolicy(slack=1.0)
    with pytest.raises(ValueError, match="cooldown_s is -1 but must be at least 0"):
        ScalingPolicy(cooldown_s=-1)


def test_memory_is_only_of_what_was_carried_out():
    pressed = [replace(CALM, wait_s=3.0)] * 2
    asked = size(pressed, memory=ScalingMemory(target=2))
    assert asked.replicas > 2
    assert size([CALM] * 2, memory=asked.memory).memory.too_small == 0, "it passed before anything was done"
    assert size([CALM] * 4, memory=asked.memory).memory.too_small == 2

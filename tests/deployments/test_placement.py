"""The placement policy, by example and by property."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.placement import Choice, PlacementPolicy, Reason, ReplicaState, rank_replicas, rendezvous_order

POLICY = PlacementPolicy(spread_load=4, max_copies=3, home_load_factor=2.0, home_load_slack=2)

replica_states = st.lists(
    st.builds(
        ReplicaState,
        key=st.text("abcdef0123456789", min_size=4, max_size=8),
        load=st.integers(0, 60),
        resident=st.booleans(),
        host_cached=st.booleans(),
        saturated=st.booleans(),
        draining=st.booleans(),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda state: state.key,
)
adapters = st.one_of(st.none(), st.text("0123456789abcdef", min_size=8, max_size=8))


def rank(replicas, adapter, in_flight=0, turn=0, policy=POLICY):
    homes = rendezvous_order(adapter, [r.key for r in replicas]) if adapter else ()
    return rank_replicas(replicas, homes, policy, in_flight, turn)


def fleet(count, **by_index):
    states = [ReplicaState(f"replica-{i}") for i in range(count)]
    for name, changes in by_index.items():
        states[int(name[1:])] = replace(states[int(name[1:])], **changes)
    return states


def home_of(adapter, count=4):
    return rendezvous_order(adapter, [f"replica-{i}" for i in range(count)])


@given(replica_states, adapters, st.integers(0, 200), st.integers(0, 1000))
def test_every_replica_stands_in_the_ranking_once(replicas, adapter, in_flight, turn):
    ranking = rank(replicas, adapter, in_flight, turn)
    assert sorted(choice.index for choice in ranking) == list(range(len(replicas)))


@given(replica_states, adapters, st.integers(0, 200), st.integers(0, 1000))
def test_a_saturated_or_draining_replica_is_never_before_one_that_can_serve(replicas, adapter, in_flight, turn):
    def rung(choice):
        state = replicas[choice.index]
        return 2 if state.draining else 1 if state.saturated else 0

    rungs = [rung(choice) for choice in rank(replicas, adapter, in_flight, turn)]
    assert rungs == sorted(rungs)


@given(replica_states, adapters.filter(bool))
def test_a_cold_adapter_goes_to_a_resident_replica_if_one_can_serve_else_to_a_cached_one(replicas, adapter):
    ready = [r for r in replicas if not r.saturated and not r.draining]
    if not ready:
        return
    first = rank(replicas, adapter, in_flight=1)[0]
    if any(r.resident for r in ready):
        assert first.reason is Reason.RESIDENT and replicas[first.index].resident
    elif any(r.host_cached for r in ready):
        assert first.reason is Reason.HOST_CACHED and replicas[first.index].host_cached
    else:
        assert first.reason is Reason.HOME


@given(replica_states, adapters.filter(bool), st.integers(0, 200), st.randoms())
def test_the_ranking_does_not_depend_on_the_order_in_which_replicas_are_listed(replicas, adapter, in_flight, random):
    shuffled = list(replicas)
    random.shuffle(shuffled)
    expected = [(replicas[c.index].key, c.reason) for c in rank(replicas, adapter, in_flight)]
    assert [(shuffled[c.index].key, c.reason) for c in rank(shuffled, adapter, in_flight)] == expected


@given(replica_states, adapters.filter(bool), st.integers(0, 200))
def test_losing_a_replica_that_was_not_chosen_moves_no_home(replicas, adapter, in_flight):
    cold = [ReplicaState(r.key) for r in replicas]
    first = rank(cold, adapter, in_flight)[0].index
    for lost in range(len(cold)):
        if lost == first:
            continue
        rest = [r for i, r in enumerate(cold) if i != lost]
        assert rest[rank(rest, adapter, in_flight)[0].index].key == cold[first].key


@given(replica_states, st.integers(0, 1000))
def test_the_base_model_goes_to_the_least_loaded_replica_that_can_serve(replicas, turn):
    ready = [r for r in replicas if not r.saturated and not r.draining]
    if ready:
        first = rank(replicas, None, turn=turn)[0]
        assert replicas[first.index] in ready
        assert replicas[first.index].load == min(r.load for r in ready)


@given(replica_states, adapters.filter(bool), st.integers(0, 100_000))
def test_copies_are_bounded_and_grow_with_load(replicas, adapter, in_flight):
    count = len(replicas)
    copies = POLICY.copies(in_flight, count)
    assert 1 <= copies <= min(count, POLICY.max_copies)
    assert copies <= POLICY.copies(in_flight + 1, count)
    assert POLICY.copies(POLICY.spread_load, count) == 1
    # Spreading never invents a replica beyond the adapter's first homes.
    for choice in rank(replicas, adapter, in_flight):
        assert choice.reason is not Reason.SPREAD or copies > 1


def test_the_base_model_takes_turns_between_equally_loaded_replicas():
    assert {rank(fleet(4), None, turn=turn)[0].index for turn in range(4)} == {0, 1, 2, 3}


def test_homes_spread_adapters_evenly_and_agree_everywhere():
    firsts = [home_of(f"adapter-{i}", 8)[0] for i in range(2000)]
    counts = [firsts.count(i) for i in range(8)]
    assert min(counts) > 180 and max(counts) < 320
    assert firsts[:5] == [home_of(f"adapter-{i}", 8)[0] for i in range(5)]


def test_a_hot_adapter_takes_a_second_replica_and_gives_it_back():
    first, second, third, _ = home_of("hot")
    states = fleet(4, **{f"r{first}": {"resident": True, "load": 6}})
    assert rank(states, "hot", in_flight=4)[0] == Choice(first, Reason.RESIDENT)
    assert rank(states, "hot", in_flight=6)[0] == Choice(second, Reason.SPREAD)
    # Not while the second home is itself as busy as the first.
    busy = fleet(4, **{f"r{first}": {"resident": True, "load": 6}, f"r{second}": {"load": 5}, f"r{third}": {"load": 5}})
    assert rank(busy, "hot", in_flight=6)[0] == Choice(first, Reason.RESIDENT)
    # Both copies share the work by load; once cold again, the second gets none although it is idle.
    both = fleet(4, **{f"r{first}": {"resident": True, "load": 6}, f"r{second}": {"resident": True, "load": 3}})
    assert rank(both, "hot", in_flight=8)[0] == Choice(second, Reason.RESIDENT)
    assert rank(both, "hot", in_flight=3)[0] == Choice(first, Reason.RESIDENT)


def test_a_cold_adapter_passes_over_a_home_that_is_far_busier_than_the_rest():
    first, second, *_ = home_of("cold")
    even = fleet(4, **{f"r{first}": {"load": 2}})
    assert rank(even, "cold")[0] == Choice(first, Reason.HOME)
    uneven = fleet(4, **{f"r{first}": {"load": 40}})
    assert rank(uneven, "cold")[0] == Choice(second, Reason.HOME)


def test_a_host_cached_copy_beats_an_idle_home():
    first, second, *_ = home_of("warm")
    states = fleet(4, **{f"r{second}": {"host_cached": True, "load": 3}})
    ranking = rank(states, "warm")
    assert ranking[:2] == [Choice(second, Reason.HOST_CACHED), Choice(first, Reason.HOME)]


@pytest.mark.parametrize(
    ("field", "value"), [("spread_load", 0), ("max_copies", 0), ("home_load_factor", 0.5), ("home_load_slack", -1)]
)
def test_a_policy_that_makes_no_sense_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        PlacementPolicy(**{field: value})

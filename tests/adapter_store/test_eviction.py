"""Which adapter goes first, by each policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.eviction import (
    EVICTION_NAMES,
    EvictionPolicy,
    GreedyDualSizeFrequency,
    LeastRecentlyUsed,
    eviction_policy,
)

MIB = 1 << 20


def order(policy: EvictionPolicy, held: str) -> str:
    """What would go, first to last, while nothing else happens."""
    return "".join(sorted(held, key=policy.value))


def test_least_recently_used_goes_first() -> None:
    policy = LeastRecentlyUsed()
    for digest in "abc":
        policy.added(digest, MIB, 1.0)
    assert order(policy, "abc") == "abc"
    policy.used("a")
    policy.released("b")
    assert order(policy, "abc") == "cab"
    policy.removed("c", evicted=True)
    policy.added("c", 1, 100.0)
    assert order(policy, "abc") == "abc"


def test_cost_keeps_what_is_small_or_slow_or_often_used() -> None:
    policy = GreedyDualSizeFrequency()
    policy.added("l", 8 * MIB, 1.0)  # large
    policy.added("u", MIB, 0.5)  # usual
    policy.added("s", MIB, 4.0)  # slow
    assert order(policy, "lus") == "lus"
    for _ in range(99):
        policy.used("l")
    assert order(policy, "lus") == "usl"


def test_cost_forgets_what_was_popular_once() -> None:
    policy = GreedyDualSizeFrequency()
    policy.added("p", MIB, 1.0)
    for _ in range(10):
        policy.used("p")
    for number in range(10):  # one-timers come and go; each that goes makes the cache older
        policy.added(str(number), MIB, 1.0)
        assert policy.value("p") > policy.value(str(number))
        policy.removed(str(number), evicted=True)
    policy.added("x", MIB, 1.0)
    policy.removed("x", evicted=True)
    policy.added("y", MIB, 1.0)
    assert policy.value("p") < policy.value("y")


def test_what_is_unloaded_on_request_ages_nobody() -> None:
    policy = GreedyDualSizeFrequency()
    policy.added("a", 1, 1000.0)
    policy.removed("a", evicted=False)
    policy.added("b", MIB, 1.0)
    policy.added("c", MIB, 1.0)
    policy.removed("b", evicted=True)
    assert policy.value("c") == pytest.approx(1.0 / MIB)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=60), st.sampled_from(EVICTION_NAMES))
def test_any_history_leaves_no_trace_of_what_is_gone(history: list[tuple[str, int]], name: str) -> None:
    policy, held = eviction_policy(name)(), set[str]()
    for digest, event in history:
        if digest not in held:
            policy.added(digest, 1 + event, 0.1 * event)
            held.add(digest)
        elif event == 0:
            policy.used(digest)
        elif event == 1:
            policy.released(digest)
        else:
            policy.removed(digest, evicted=event == 2)
            held.remove(digest)
        assert all(policy.value(digest) >= 0 for digest in held)
    for digest in held:
        policy.removed(digest, evicted=True)
    state = vars(policy).values()
    assert not any(isinstance(part, dict) and part for part in state)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="eviction is 'random' but must be one of lru, cost"):
        eviction_policy("random")

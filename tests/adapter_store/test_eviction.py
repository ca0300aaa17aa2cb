"""Which adapter goes first, by each policy."""

from __future__ import annotations

import random
from math import isfinite

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.eviction import (
    EVICTION_NAMES,
    REMEMBERED,
    EvictionPolicy,
    FadingUses,
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
    policy = FadingUses()
    policy.added("l", 8 * MIB, 1.0)  # large
    policy.added("u", MIB, 0.5)  # usual
    policy.added("s", MIB, 4.0)  # slow
    assert order(policy, "lus") == "lus"
    for _ in range(99):
        policy.used("l")
    assert order(policy, "lus") == "usl"


def test_cost_forgets_what_was_popular_once() -> None:
    policy = FadingUses()
    policy.added("p", MIB, 1.0)
    policy.added("n", MIB, 1.0)
    for _ in range(16):
        policy.used("p")
    asked = 0
    while policy.value("p") > policy.value("n"):
        policy.used("n")
        asked += 1
    # Without fading it would be 16: every 32 uses of the two halve what p had.
    assert 8 < asked < 15


def test_uses_outlast_eviction() -> None:
    """Asked for every other time, of two that pass through one place beside one that is asked for no more."""
    policy = FadingUses()
    for digest in "oa":
        policy.added(digest, MIB, 1.0)
    for _ in range(4):
        policy.used("o")
    for _ in range(6):
        policy.removed("a", evicted=True)
        policy.added("b", MIB, 1.0)
        policy.removed("b", evicted=True)
        policy.added("a", MIB, 1.0)
    assert policy.value("a") > policy.value("o")


def test_what_is_unloaded_on_request_is_forgotten() -> None:
    policy = FadingUses()
    for digest in "ab":
        policy.added(digest, MIB, 1.0)
    for _ in range(9):
        policy.used("a")
    policy.removed("a", evicted=False)
    policy.added("a", MIB, 1.0)
    policy.used("b")
    assert order(policy, "ab") == "ab"


def test_memory_of_what_was_evicted_is_bounded_and_keeps_the_most_used() -> None:
    policy = FadingUses()
    policy.added("often", MIB, 1.0)
    for _ in range(100):
        policy.used("often")
    policy.removed("often", evicted=True)
    for number in range(1000):
        policy.added(str(number), MIB, 1.0)
        policy.removed(str(number), evicted=True)
        assert len(vars(policy)["_before"]) <= 2 * REMEMBERED * 2
    policy.added("new", MIB, 1.0)
    policy.added("often", MIB, 1.0)
    assert policy.value("often") > policy.value("new")


def misses(name: str, held_at_most: int, requests: list[int]) -> float:
    """Share of the requests that one cache does not find."""
    policy, held, missed = eviction_policy(name)(), set[str](), 0
    for digest in map(str, requests):
        if digest in held:
            policy.used(digest)
            continue
        missed += 1
        if len(held) == held_at_most:
            victim = min(held, key=policy.value)
            held.remove(victim)
            policy.removed(victim, evicted=True)
        held.add(digest)
        policy.added(digest, 1, 1.0)
    return missed / len(requests)


def test_under_zipfs_law_cost_is_near_the_best_and_follows_when_it_changes() -> None:
    weights = [1 / (rank + 1) for rank in range(50)]
    draws = random.Random(0).choices(range(50), weights, k=4000)
    best = 1 - sum(weights[:8]) / sum(weights)
    assert misses("cost", 8, draws) < 1.12 * best < 1.25 * best < misses("lru", 8, draws)
    moving = [(draw + 10 * (at // 1000)) % 50 for at, draw in enumerate(draws)]
    assert misses("cost", 8, moving) < misses("lru", 8, moving), "other adapters are asked for every 1000 requests"


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
        assert all(isfinite(policy.value(digest)) for digest in held)
    for digest in "abcd":
        if digest not in held:
            policy.added(digest, 1, 1.0)
        policy.removed(digest, evicted=False)
    state = vars(policy).values()
    assert not any(isinstance(part, dict) and part for part in state)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="eviction is 'random' but must be one of lru, cost"):
        eviction_policy("random")

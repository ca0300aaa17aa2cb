"""What a new replica is warmed up with, and that nothing keeps it from starting."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from adapter_store.errors import AdapterUnavailable
from deployments.placement import PlacementRequest, place
from deployments.routing.fleet_view import FleetView
from deployments.routing.placement_policy import PlacementPolicy
from deployments.routing.short_key import short_key
from deployments.scaling.heat import HotAdapter
from deployments.scaling.warm_up import choose, warm_up


def hot(number, *, heat=None, rank=16):
    digest = f"{number:016x}{0:048x}"
    return HotAdapter(f"local:{number}", digest, rank, 1000.0 - number if heat is None else heat)


ADAPTERS = [hot(number) for number in range(200)]
REPLICAS = [f"replica-{number}" for number in range(8)]


def home(adapter, replicas):
    """Where the router would send its first request to."""
    view = FleetView(PlacementPolicy())
    view.keep_only(replicas)
    return place(view, PlacementRequest(short_key(adapter.digest)), 0.0)[0].replica


# -- the choice ----------------------------------------------------------------------------------------------


def test_its_own_come_first_hottest_first_then_the_hottest_of_the_rest():
    own = [one for one in ADAPTERS if home(one, REPLICAS) == "replica-3"]
    assert 5 < len(own) < 60
    others = [name for name in REPLICAS if name != "replica-3"]
    assert choose(ADAPTERS, "replica-3", others, {16: 5}) == own[:5]
    chosen = choose(ADAPTERS, "replica-3", others, {16: 64})
    assert chosen[: len(own)] == own
    assert chosen[len(own) :] == [one for one in ADAPTERS if one not in own][: 64 - len(own)]


def test_the_first_replica_takes_the_hottest_of_all():
    assert choose(ADAPTERS, "replica-0", [], {16: 7}) == ADAPTERS[:7]
    assert choose(ADAPTERS[::-1], "replica-0", ["replica-0"], {16: 7}) == ADAPTERS[:7]


@given(
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from([0, 4, 16, 17, 64]), st.floats(0, 9)), max_size=60),
    st.dictionaries(st.sampled_from([16, 32, 64]), st.integers(0, 20), max_size=3),
)
def test_the_slots_hold_every_adapter_that_is_chosen(entries, slots):
    hottest = [
        hot(number, heat=heat, rank=rank) for number, rank, heat in {entry[0]: entry for entry in entries}.values()
    ]
    chosen = choose(hottest, "replica-1", REPLICAS, slots)
    assert len(set(chosen)) == len(chosen) <= sum(slots.values())
    for least in (17, 33):
        assert sum(one.rank >= least for one in chosen) <= sum(n for rank, n in slots.items() if rank >= least)
    if len(chosen) < min(len(hottest), sum(slots.values())):
        assert any(one.rank > 16 for one in hottest if one not in chosen), "only what does not fit is left out"


def test_replicas_that_start_together_share_the_adapters():
    """Each knows of the others by then, and takes its own first."""
    taken = [choose(ADAPTERS, name, REPLICAS, {16: 8}) for name in REPLICAS]
    assert max(Counter(one.digest for chosen in taken for one in chosen).values()) == 1


# -- the doing -----------------------------------------------------------------------------------------------


class Store:
    """Prefetches as an engine does: some adapters fail, some take for ever."""

    def __init__(self, *, broken=(), slow=()):
        self.broken, self.slow = broken, slow
        self.asked, self.now, self.most = [], 0, 0

    async def prefetch(self, name, digest=None):
        self.asked.append(name)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(3600 if name in self.slow else 0)
        finally:
            self.now -= 1
        if name in self.broken:
            raise AdapterUnavailable(name, "its source does not answer")
        return True


async def known():
    return ADAPTERS[:20]


async def test_all_are_brought_here_in_order_some_at_a_time():
    store = Store(broken={"local:0", "local:7"})
    assert await warm_up(store, known, 30.0, at_once=4) == 18
    assert store.asked == [one.reference for one in ADAPTERS[:20]]
    assert store.most == 4


@pytest.mark.parametrize("at_once", [1, 8])
async def test_a_source_that_is_silent_costs_the_limit_and_no_more(at_once):
    store = Store(slow={one.reference for one in ADAPTERS[3:20]})
    started = time.monotonic()
    assert await warm_up(store, known, 0.2, at_once=at_once) == 3
    assert 0.2 <= time.monotonic() - started < 10
    assert store.now == 0, "nothing is left behind that waits"


async def test_one_silent_source_holds_up_no_other():
    store = Store(slow={"local:0"})
    assert await warm_up(store, known, 0.5, at_once=2) == 19


async def test_without_a_hub_a_replica_starts_cold():
    async def dead():
        raise RayActorError

    async def silent():
        await asyncio.sleep(3600)
        return ADAPTERS

    async def lost():
        raise ValueError("there is no actor of this name")

    for hub in (dead, silent, lost):
        store = Store()
        assert await warm_up(store, hub, 0.1) == 0
        assert store.asked == []

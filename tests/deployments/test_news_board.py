"""News on their way from replicas over the hub to a router's view: nothing missing, nothing believed for too long."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.news.holdings import Holdings
from deployments.news.message import ReplicaNews, pack_keys, pack_load
from deployments.news.news_board import LEAST_PAUSE_SECONDS, TRUSTED_SECONDS, NewsBoard
from deployments.news.reader import NewsReader
from deployments.routing.fleet_view import FleetView, ReplicaLoad, Tier
from deployments.routing.placement_policy import PlacementPolicy

KEYS = [f"{number:016x}" for number in range(8)]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Replica:
    """A publisher without its loop: what ``NewsPublisher`` sends."""

    def __init__(self, name):
        self.name = name
        self.holdings = Holdings()
        self.sequence = 0
        self.whole = True
        self.slots = set()

    def have(self, keys):
        self.slots = set(keys)
        self.holdings.in_slots(keys)

    def tell(self, board, load=None, *, lost=False):
        changes = self.holdings.changes()
        self.sequence += bool(changes)
        everything = self.holdings.everything() if self.whole else changes
        keys = pack_keys(everything) if self.whole or changes else None
        news = ReplicaNews(self.name, self.sequence, self.whole, keys, load and pack_load(load))
        if lost:
            self.whole = True
            return
        while (receipt := board.publish(news)).whole_wanted:
            news = ReplicaNews(self.name, self.sequence, True, pack_keys(self.holdings.everything()))
        self.whole = False
        assert receipt.pause_s >= LEAST_PAUSE_SECONDS


class Router:
    def __init__(self, clock):
        self.view = FleetView(PlacementPolicy())
        self.reader = NewsReader(self.view, clock)
        self.bytes = 0

    def serve_says(self, *replicas):
        self.view.keep_only(replicas)
        self.reader.keep_only(replicas)

    async def read(self, board):
        for _ in range(2):  # the second time if something was missing
            asked = self.reader.cursor
            answer = await board.watch("router", asked, 0.0)
            self.bytes = sum(news.nbytes for news in answer.news)
            await self.reader.take(asked, answer)
            if self.reader.cursor is not None:
                return
        raise AssertionError("all was asked for, and still something is missing")

    def resident(self, replica):
        held = {key for key in KEYS if self.view.holders(key, 0.0)[Tier.RESIDENT]}
        return {key for key in held if self.view.indices([replica])[0] in self.view.holders(key, 0.0)[Tier.RESIDENT]}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return NewsBoard(clock)


async def test_a_new_router_knows_everything_and_then_hears_changes_only(board, clock):
    replica, router = Replica("a"), Router(clock)
    replica.have(KEYS[:3])
    replica.tell(board, ReplicaLoad(running=5, max_rows=8))
    router.serve_says("a", "b")
    await router.read(board)
    assert router.resident("a") == set(KEYS[:3])
    assert list(router.view.loads) == [5 / 8, 0]
    replica.have(KEYS[1:4])
    replica.tell(board)
    await router.read(board)
    assert router.resident("a") == set(KEYS[1:4])
    assert router.bytes == 24 + 2 * 8


async def test_a_waiting_reader_is_woken_by_a_change_and_not_by_a_heartbeat(board, clock):
    replica, router = Replica("a"), Router(clock)
    replica.tell(board)
    router.serve_says("a")
    await router.read(board)
    waiting = asyncio.create_task(board.watch("router", router.reader.cursor, 60.0))
    await asyncio.sleep(0.01)
    replica.tell(board)
    await asyncio.sleep(0.01)
    assert not waiting.done(), "a heartbeat tells readers nothing"
    replica.have(KEYS[:1])
    replica.tell(board)
    assert [news.replica for news in (await asyncio.wait_for(waiting, 1.0)).news] == ["a"]


async def test_a_replica_that_serve_told_of_late_is_known_all_the_same(board, clock):
    replica, router = Replica("a"), Router(clock)
    router.serve_says("b")
    await router.read(board)
    replica.have(KEYS[:2])
    replica.tell(board)
    await router.read(board)
    router.serve_says("a", "b")
    await router.read(board)
    assert router.resident("a") == set(KEYS[:2])
    router.serve_says("b")
    router.serve_says("a", "b")  # a controller that was restarted may forget one for a moment
    await router.read(board)
    assert router.resident("a") == set(KEYS[:2])


async def test_a_new_hub_hears_everything_and_until_then_what_was_known_stays(board, clock):
    told, silent, router = Replica("a"), Replica("b"), Router(clock)
    for replica in (told, silent):
        replica.have(KEYS[:2])
        replica.tell(board)
    router.serve_says("a", "b")
    await router.read(board)
    again = NewsBoard(clock)
    told.have(KEYS[1:3])
    told.tell(again)  # a change only: it is asked for everything
    await router.read(again)
    assert router.resident("a") == set(KEYS[1:3])
    assert router.resident("b") == set(KEYS[:2]), "it may not have found the new hub yet"
    clock.now += TRUSTED_SECONDS + 1
    told.tell(again)
    await router.read(again)
    assert router.resident("a") == set(KEYS[1:3])
    assert router.resident("b") == set()


async def test_a_silent_replica_is_believed_no_longer_and_one_that_comes_back_is(board, clock):
    replica, router = Replica("a"), Router(clock)
    replica.have(KEYS[:2])
    replica.tell(board, ReplicaLoad(saturated=True))
    router.serve_says("a")
    await router.read(board)
    assert list(router.view.closed) == [1]
    clock.now += TRUSTED_SECONDS + 1
    await router.read(board)
    assert router.resident("a") == set()
    assert list(router.view.closed) == [0]
    replica.tell(board)
    await router.read(board)
    assert router.resident("a") == set(KEYS[:2])


async def test_a_hub_that_does_not_answer_is_believed_for_a_while_only(board, clock):
    replica, router = Replica("a"), Router(clock)
    replica.have(KEYS[:2])
    replica.tell(board)
    router.serve_says("a")
    await router.read(board)
    clock.now += TRUSTED_SECONDS - 1
    router.reader.unanswered()
    assert router.resident("a") == set(KEYS[:2])
    clock.now += 2
    router.reader.unanswered()
    assert router.resident("a") == set()
    replica.tell(board)
    await router.read(board)
    assert router.resident("a") == set(KEYS[:2]), "it was only out of reach"


async def test_a_new_reader_is_sent_no_more_than_twice_what_there_is(board, clock):
    replica = Replica("a")
    everything = [f"{number:016x}" for number in range(2000)]
    for turn in range(3000):
        replica.have(everything[: 1000 + turn % 2])
        replica.tell(board)
    router = Router(clock)
    router.serve_says("a")
    await router.read(board)
    assert router.bytes <= 2 * 8 * 1100


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("have"), st.sampled_from("ab"), st.sets(st.sampled_from(KEYS), max_size=4)),
        st.tuples(st.just("tell"), st.sampled_from("ab"), st.booleans()),
        st.tuples(st.just("read"), st.sampled_from("xy")),
        st.tuples(st.just("hub"), st.none()),
        st.tuples(st.just("serve"), st.sampled_from("xy"), st.sets(st.sampled_from("ab"))),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_whatever_gets_lost_views_end_up_at_what_is_so(steps):
    """Messages lost, hubs lost, replicas unknown for a while: after one more word from each, every router is right."""

    async def run():
        clock = Clock()
        board = NewsBoard(clock)
        replicas = {name: Replica(name) for name in "ab"}
        routers = {name: Router(clock) for name in "xy"}
        for step in steps:
            match step:
                case ("have", name, keys):
                    replicas[name].have(keys)
                case ("tell", name, lost):
                    replicas[name].tell(board, lost=lost)
                case ("read", name):
                    await routers[name].read(board)
                case ("hub", _):
                    board = NewsBoard(clock)
                case ("serve", name, here):
                    routers[name].serve_says(*here)
        for replica in replicas.values():
            replica.tell(board)
        for router in routers.values():
            router.serve_says("a", "b")
            await router.read(board)
            assert {name: router.resident(name) for name in "ab"} == {n: r.slots for n, r in replicas.items()}

    asyncio.run(run())


async def test_what_is_not_urgent_waits_for_the_next_answer():
    board, load = NewsBoard(), pack_load(ReplicaLoad(running=1, max_rows=8))
    board.publish(ReplicaNews("a", 0, True, pack_keys(Holdings().everything())))
    cursor = (await board.watch("router", None, 0.0)).cursor
    waiting = asyncio.create_task(board.watch("router", cursor, 60.0))
    await asyncio.sleep(0)
    board.publish(ReplicaNews("a", 0, load=load, urgent=False))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    board.publish(ReplicaNews("b", 0, True, pack_keys(Holdings().everything())))
    news = (await waiting).news
    assert [(one.replica, one.load) for one in news] == [("a", load), ("b", None)]

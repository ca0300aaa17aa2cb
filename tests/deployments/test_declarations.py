"""What is declared at run time reaches everybody, also latecomers, and outlives the hub it was told to."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from deployments.adapters import declaration_feed
from deployments.adapters.declaration_feed import DeclarationFeed
from deployments.adapters.declarations import FORGET_AFTER_NS, Declaration, Declarations, stamped
from deployments.protocol.errors import ApiError

from .local_hub import LocalHub


class Cluster:
    """Listeners of one hub that can be replaced."""

    def __init__(self) -> None:
        self.hub = LocalHub()
        self.feeds: list[DeclarationFeed] = []

    async def find(self):
        return self.hub

    async def listener(self) -> DeclarationFeed:
        async def changed(_):
            await asyncio.sleep(0)

        feed = DeclarationFeed(self.find, changed)
        self.feeds.append(feed)
        assert await feed.wait_heard()
        return feed

    async def close(self) -> None:
        for feed in self.feeds:
            await feed.close()


@pytest.fixture
async def cluster(monkeypatch):
    monkeypatch.setattr(declaration_feed, "RETRY_SECONDS", 0.01)
    made = Cluster()
    yield made
    await made.close()


def test_of_two_words_on_a_name_the_later_holds_whatever_order_they_come_in():
    first, second = Declaration("a", 1, "hub:o/a"), Declaration("a", 2, None)
    one, other = Declarations(), Declarations()
    assert one.merge([first]) == [first] and one.merge([second]) == [second]
    assert other.merge([second]) == [second] and other.merge([first]) == []
    assert one == other and one.references() == {}


def test_stamps_grow_also_when_the_clock_goes_back_and_what_says_nothing_is_forgotten_late():
    known = Declarations()
    known.merge([Declaration("a", 1000, "hub:o/a"), Declaration("b", 900, None)])
    assert stamped(Declaration("c"), 5, known).stamp == 1001
    assert known.forget_old(FORGET_AFTER_NS) == []
    assert known.forget_old(FORGET_AFTER_NS + 2000) == ["b"]
    assert list(known.by_name) == ["a"]


async def test_a_declaration_is_known_everywhere_when_declare_returns_and_to_those_who_come_later(cluster):
    first, second = await cluster.listener(), await cluster.listener()
    made = await first.declare("a", reference="hub:o/a", pinned=True)
    assert first.known.get("a") == second.known.get("a") == made
    late = await cluster.listener()
    assert late.known.get("a") == made and late.known.pinned() == ["a"]
    await second.declare("a", reference=None, pinned=False)
    assert not any(one.known.references() for one in (first, second, late))


async def test_of_two_changes_at_once_one_is_told_that_it_lost(cluster):
    first, second = await cluster.listener(), await cluster.listener()
    outcomes = await asyncio.gather(
        first.declare("a", reference="hub:o/x"), second.declare("a", reference="hub:o/y"), return_exceptions=True
    )
    lost = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
    won = [outcome for outcome in outcomes if isinstance(outcome, Declaration)]
    assert len(lost) == len(won) == 1 and lost[0].status == 409
    assert first.known.get("a") == second.known.get("a") == won[0]


async def test_a_new_hub_learns_from_those_who_watched_the_old_one(cluster):
    first, second = await cluster.listener(), await cluster.listener()
    made = await first.declare("a", reference="hub:o/a")
    gone = await first.declare("b", reference="hub:o/b")
    await first.declare("b", reference=None)
    old, cluster.hub = cluster.hub, LocalHub()
    old.die()
    await old.hub.restore([Declaration("wake", 1)])  # a dying actor's callers come back with its error
    for _ in range(500):
        if cluster.hub.hub._declarations.get("a") == made:
            break
        await asyncio.sleep(0.01)
    late = await cluster.listener()
    assert late.known.get("a") == made and "b" not in late.known.references()
    with pytest.raises(ApiError, match="changed by somebody"):
        late.known.by_name["b"] = gone  # as one who slept through the removal would say it
        await late.declare("b", pinned=True)
    again = await second.declare("a", pinned=True)
    assert again == replace(made, stamp=again.stamp, pinned=True)


async def test_without_a_hub_a_declaration_fails_with_a_status_and_changes_nothing(cluster):
    feed = await cluster.listener()
    cluster.hub.die()
    with pytest.raises(ApiError) as caught:
        await feed.declare("a", reference="hub:o/a")
    assert (caught.value.status, caught.value.code) == (503, "hub_unavailable")
    assert feed.known.references() == {}

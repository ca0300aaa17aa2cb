"""What a router believes about residency, and the hub that tells it, without a cluster."""

from __future__ import annotations

import asyncio

from deployments.hub import FleetHub
from deployments.residency import ReplicaNews, ResidencyView, short_key

DIGEST = "ab" * 32
OTHER = "cd" * 32


def news(replica, version, *digests, **extra):
    return ReplicaNews(replica, version, frozenset(short_key(d) for d in digests), **extra)


def test_a_report_replaces_the_one_before_and_an_old_one_is_ignored():
    view = ResidencyView()
    view.apply([news("a", 1, DIGEST)])
    view.apply([news("a", 3, OTHER, host_cached=frozenset({short_key(DIGEST)}))])
    view.apply([news("a", 2, DIGEST)])
    assert view.is_resident("a", OTHER, now=0.0) and not view.is_resident("a", DIGEST, now=0.0)
    assert view.is_host_cached("a", DIGEST) and not view.is_host_cached("b", DIGEST)


def test_a_prediction_counts_until_it_expires_and_does_not_pile_up():
    view = ResidencyView(prediction_ttl_s=1.0)
    view.predict("a", DIGEST, now=10.0)
    assert view.is_resident("a", DIGEST, now=10.9) and not view.is_resident("b", DIGEST, now=10.9)
    assert not view.is_resident("a", DIGEST, now=11.0)
    for tick in range(1000):
        view.predict("a", f"{tick:064x}", now=20.0 + tick / 10)
    assert len(view._predicted) <= 11


def test_a_dead_replica_is_forgotten_and_the_others_are_not():
    view = ResidencyView()
    view.apply([news("a", 1, DIGEST), news("b", 1, DIGEST)])
    view.predict("a", OTHER, now=0.0)
    view.predict("c", OTHER, now=0.0)
    view.forget("a")
    assert not view.is_resident("a", DIGEST, 0.0) and not view.is_resident("a", OTHER, 0.0)
    assert view.is_resident("b", DIGEST, 0.0) and view.is_resident("c", OTHER, 0.0)
    view.keep_only(["c"])
    assert not view.is_resident("b", DIGEST, 0.0) and view.is_resident("c", OTHER, 0.0)


async def test_a_watcher_gets_what_is_new_since_its_cursor():
    hub = FleetHub()
    await hub.publish(news("a", 1, DIGEST))
    cursor, reports = await hub.watch()
    assert [r.replica for r in reports] == ["a"]

    waiting = asyncio.create_task(hub.watch(cursor))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await hub.publish(news("a", 1, OTHER))  # not newer: nobody is woken
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await hub.publish(news("b", 1, OTHER))
    cursor, reports = await asyncio.wait_for(waiting, 1.0)
    assert [r.replica for r in reports] == ["b"]
    assert await hub.watch(cursor, wait_s=0.01) == (cursor, [])


async def test_a_restarted_hub_sends_everything_to_a_watcher_with_an_old_cursor():
    old, new = FleetHub(), FleetHub()
    for version in range(1, 6):
        await old.publish(news("a", version, DIGEST))
    cursor, _ = await old.watch()
    await new.publish(news("a", 5, DIGEST))
    _, reports = await asyncio.wait_for(new.watch(cursor), 1.0)
    assert [r.replica for r in reports] == ["a"]

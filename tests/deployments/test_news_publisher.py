"""A replica's voice and a router's ear, with the real hub between them in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from deployments.news import publisher as news_publisher
from deployments.news import reader as news_reader
from deployments.news.holdings import Holdings
from deployments.news.publisher import NewsPublisher
from deployments.news.reader import NewsReader, listen
from deployments.routing.fleet_view import FleetView, ReplicaLoad, Tier
from deployments.routing.placement_policy import PlacementPolicy

from .local_hub import LocalHub

KEYS = [f"{number:016x}" for number in range(100)]


class Scene:
    """One replica, one router, and the hub of the moment."""

    def __init__(self):
        self.hub = LocalHub()
        self.holdings = Holdings()
        self.load = ReplicaLoad(max_rows=8)
        self.view = FleetView(PlacementPolicy())
        self.view.keep_only(("replica",))
        self.reader = NewsReader(self.view)
        self.reader.keep_only(("replica",))
        self.published = 0
        self.publisher = NewsPublisher("replica", self.holdings, lambda: self.load, self.find)
        self.ear = asyncio.create_task(listen(self.find, self.reader))

    async def find(self):
        if self.hub.dead:
            raise ValueError("no such actor")
        return self.hub

    def count_messages(self):
        publish = self.hub.hub.publish

        async def counted(news):
            self.published += 1
            return await publish(news)

        self.hub.hub.publish = counted

    async def close(self):
        self.ear.cancel()
        await self.publisher.close()

    def resident(self):
        return {key for key in KEYS if self.view.holders(key, 0.0)[Tier.RESIDENT]}


@pytest.fixture
async def scene():
    made = Scene()
    yield made
    await made.close()


async def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_what_changes_while_a_message_is_under_way_goes_together(scene):
    await until(lambda: scene.reader.cursor)
    scene.count_messages()
    for count in range(len(KEYS)):
        scene.holdings.in_slots(KEYS[: count + 1])
        scene.publisher.changed()
        await asyncio.sleep(0)
    await until(lambda: scene.resident() == set(KEYS))
    assert scene.published < 20


async def test_a_load_that_changes_all_the_time_is_told_now_and_then_and_at_last(scene):
    await until(lambda: scene.view.step_rows == 8)
    scene.holdings.asked(KEYS[0])  # busy
    scene.publisher.changed()
    await asyncio.sleep(0.05)
    scene.count_messages()
    started = time.monotonic()
    for running in range(1, 301):
        scene.load = ReplicaLoad(running=running, max_rows=8)
        await asyncio.sleep(0.001)
    await until(lambda: scene.view.loads[0] == 300 / 8)
    assert scene.published <= 2 + (time.monotonic() - started) / news_publisher.LOOK_SECONDS


async def test_a_load_that_decides_nothing_is_told_at_leisure(scene, monkeypatch):
    monkeypatch.setattr(news_publisher, "HEARTBEAT_SECONDS", 60.0)
    monkeypatch.setattr(news_publisher, "LOOK_SECONDS", 0.001)
    await until(lambda: scene.view.step_rows == 8)
    scene.count_messages()
    scene.load = ReplicaLoad(running=1, max_rows=8)
    await asyncio.sleep(0.1)
    assert not scene.published
    scene.load = ReplicaLoad(running=2, max_rows=8)
    await until(lambda: scene.view.loads[0] == 2 / 8)
    scene.load = ReplicaLoad(running=3, max_rows=8)
    scene.holdings.in_slots(KEYS[:1])
    scene.publisher.changed()
    await until(scene.resident)
    assert scene.view.loads[0] == 3 / 8, "it goes along with news of adapters"
    assert scene.published == 2


async def test_what_routers_expect_anyway_goes_along_with_other_news(scene, monkeypatch):
    monkeypatch.setattr(news_publisher, "HEARTBEAT_SECONDS", 60.0)
    monkeypatch.setattr(news_publisher, "LOOK_SECONDS", 0.001)
    await until(lambda: scene.view.step_rows == 8)
    scene.count_messages()
    assert scene.holdings.asked(KEYS[0])
    await asyncio.sleep(0.1)
    assert not scene.published
    scene.holdings.in_slots(KEYS[1:2])
    scene.publisher.changed()
    await until(scene.resident)
    assert scene.view.holders(KEYS[0], 0.0)[Tier.LOADING] == [0]
    assert scene.published == 1


async def test_a_full_queue_is_told_without_waiting_for_the_next_look_at_the_load(scene, monkeypatch):
    monkeypatch.setattr(news_publisher, "LOOK_SECONDS", 60.0)
    await until(lambda: scene.reader.cursor)
    scene.load = ReplicaLoad(max_rows=8, saturated=True)
    scene.publisher.changed()
    await until(lambda: scene.view.closed[0] == 1)


async def test_nothing_is_lost_with_a_hub(scene, monkeypatch):
    monkeypatch.setattr(news_publisher, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(news_reader, "RETRY_SECONDS", 0.01)
    scene.holdings.in_slots(KEYS[:5])
    scene.publisher.changed()
    await until(lambda: scene.resident() == set(KEYS[:5]))
    scene.hub.die()
    scene.holdings.in_slots(KEYS[3:8])
    scene.publisher.changed()
    await asyncio.sleep(0.05)
    assert scene.resident() == set(KEYS[:5]), "what was last heard"
    scene.hub = LocalHub()
    await until(lambda: scene.resident() == set(KEYS[3:8]))
    scene.holdings.in_slots(KEYS[:1])
    scene.publisher.changed()
    await until(lambda: scene.resident() == set(KEYS[:1]))


async def test_a_hub_that_hangs_is_looked_up_anew(scene, monkeypatch):
    monkeypatch.setattr(news_publisher, "HUB_SECONDS", 0.05)
    monkeypatch.setattr(news_publisher, "RETRY_SECONDS", 0.01)
    await until(lambda: scene.reader.cursor)
    hung = scene.hub.hub

    async def never(_):
        await asyncio.sleep(60)

    publish, hung.publish = hung.publish, never
    scene.holdings.in_slots(KEYS[:2])
    scene.publisher.changed()
    await asyncio.sleep(0.1)
    hung.publish = publish
    await until(lambda: scene.resident() == set(KEYS[:2]))

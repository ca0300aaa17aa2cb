"""The replicas and routers of the news benchmark, over the real hub in this process."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.news.fleet import SLOTS, Listeners, Talkers
from tests.deployments.local_hub import LocalHub


async def test_what_talkers_tell_listeners_hear():
    hub: Any = LocalHub()
    talking = asyncio.create_task(Talkers(hub, ["a", "b"], 50, 100.0).talk(0.6, 0.1))
    listeners = Listeners(hub, ["a", "b"], 3)
    delays, answers, _ = await listeners.hear(0.3, 0.2)
    size, _ = await listeners.begin()
    published, _ = await talking
    assert 3 <= len(delays) <= answers
    assert max(delays) < 5
    assert published >= 4
    assert size >= 2 * 8 * (50 + SLOTS // 4)

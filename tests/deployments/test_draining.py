"""A replica that is told to stop: what is called when, and that Serve's own field is still there."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from ray.serve._private import replica

from deployments import draining
from deployments.draining import Drain, told_to_stop


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(draining, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(draining, "LAST_CALL_SECONDS", 0.05)


async def test_what_runs_is_left_alone_until_shortly_before_the_end():
    told, said = [False], []
    drain = Drain(0.2, lambda: said.append("last call"), lambda: said.append("begins"), lambda: told[0])
    drain.start()
    drain.start()
    await asyncio.sleep(0.02)
    assert not said
    told[0] = True
    await asyncio.sleep(0.05)
    assert said == ["begins"]
    async with asyncio.timeout(2.0):
        while said.count("last call") < 3:  # noqa: ASYNC110 (for what still came)
            await asyncio.sleep(0.005)
    await drain.close()
    assert said.count("begins") == 1
    before = len(said)
    await asyncio.sleep(0.02)
    assert len(said) == before


async def test_a_short_deadline_is_halved():
    said = []
    drain = Drain(0.04, lambda: said.append("last call"), told=lambda: True)
    drain.start()
    async with asyncio.timeout(2.0):
        while not said:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await drain.close()


def test_outside_of_a_replica_nobody_is_told_and_serve_still_has_the_field():
    assert not told_to_stop()
    assert "_replica_impl" in inspect.getsource(replica.ReplicaActor)
    assert "self._shutting_down = True" in inspect.getsource(replica.Replica._perform_graceful_shutdown)

"""What an engine's work looks like to the autoscaler, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from adapter_store.catalog import Catalog
from deployments.scaling.decision import ReplicaPressure
from deployments.scaling.heat import HotAdapter
from deployments.scaling.pressure import PressureGauge
from deployments.scaling.warm_up import warm_up
from engine.engine import Engine
from engine.request import GenerationRequest, SamplingParams
from examples.demo.words import ADAPTERS

from .conftest import STORE


@pytest.fixture
async def engine(engine) -> AsyncIterator[Engine]:
    """One in which no other test has left anything."""
    made = Engine(engine.settings)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
def adapters() -> dict[str, HotAdapter]:
    """The demo's adapters."""
    catalog = Catalog(STORE)
    found = {name: catalog.resolve(name) for name in ADAPTERS}
    return {name: HotAdapter(str(one.ref), one.digest, 0, 1.0) for name, one in found.items()}


def request(number: int, adapter: HotAdapter | None, tokens: int) -> GenerationRequest:
    named = {} if adapter is None else {"adapter": adapter.reference, "adapter_digest": adapter.digest}
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(f"pressure-{number}", (5, 6), sampling=sampling, **named)


async def run(engine, asked: GenerationRequest) -> None:
    async for _ in engine.generate(asked):
        pass


async def test_rows_waits_slots_and_loads_are_seen(engine, adapters):
    gauge = PressureGauge(engine)
    idle = ReplicaPressure(**gauge.read())
    assert idle == ReplicaPressure(rows=0, max_rows=8, wait_s=0, slots_used=0, loading=0)
    # Four adapters for three slots, and more requests than rows.
    names = list(adapters)
    runs = [asyncio.create_task(run(engine, request(n, adapters[names[n % 4]], 120))) for n in range(12)]
    seen: list[ReplicaPressure] = []
    while not all(one.done() for one in runs):
        seen.append(ReplicaPressure(**gauge.read()))
        await asyncio.sleep(0.02)
    await asyncio.gather(*runs)
    assert max(one.rows for one in seen) == 12
    assert max(one.wait_s for one in seen) > 0
    assert max(one.slots_used for one in seen) == 1
    assert max(one.loading for one in seen) > 0
    gauge.read()
    assert ReplicaPressure(**gauge.read()) == idle


async def test_what_a_replica_is_warmed_up_with_is_in_its_slots(engine, adapters):
    names = list(adapters)
    gone = HotAdapter("local:/no/such/folder", "0" * 64, 0, 9.0)

    async def wanted():
        return [adapters[names[0]], gone, adapters[names[1]], adapters[names[2]]]

    assert await warm_up(engine, wanted, 60.0) == 3
    misses = engine.stats().slot_misses
    for number, name in enumerate(names[:3]):
        await run(engine, request(number, adapters[name], 2))
    assert engine.stats().slot_misses == misses

"""What metrics are made of: readings of a real engine, and requests as the service tells of them."""

from __future__ import annotations

import pytest

from adapter_store.errors import AdapterError
from adapter_store.load_stats import LoadTotals
from deployments.api.service import CompletionService
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError
from deployments.replica_metrics import COUNTERS, GAUGES, durations, read
from deployments.tenants.caller import Caller
from engine.request import InvalidRequest
from examples.demo.words import held_out_prompts

from .conftest import DEMO, STORE

PROMPT = held_out_prompts(1)[0]


def body(**changes):
    return CompletionBody(**({"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes))


@pytest.fixture
def told(service, fleet):
    seen = []
    made = CompletionService(
        service.directory, DEMO / "model", fleet, fleet.engine.max_model_len, observe=lambda *what: seen.append(what)
    )
    return made, seen


def test_a_reading_has_every_metric_and_totals_grow_with_what_is_done(engine):
    reading = read(engine, refused=True)
    assert {name for name, _ in reading.now} == set(GAUGES)
    assert {name for name, _ in reading.totals} == set(COUNTERS)
    assert reading.now["lorafleet_user_config_refused", ""] == 1


async def test_requests_move_the_numbers_they_should(engine, service):
    before = read(engine, refused=False)
    for model in ("shout", "json", "spanish", "mirror", "shout"):  # three slots
        await (await service.start(body(model=model), stream=False, caller=Caller())).finished()
    after = read(engine, refused=False)
    grown = {key: total - before.totals[key] for key, total in after.totals.items()}
    assert grown["lorafleet_adapter_misses_total", "slot"] >= 1
    assert grown["lorafleet_tokens_total", "generated"] > 0
    assert after.now["lorafleet_adapters", "slot"] == 3
    assert after.now["lorafleet_adapter_bytes", "host"] > 0
    assert after.loads["pack"].done == after.totals["lorafleet_adapter_loads_total", "pack"] >= 1
    assert after.totals["lorafleet_adapter_loading_seconds_total", "pack"] == after.loads["pack"].seconds > 0


async def test_a_reading_tells_of_the_copies_to_slots_and_of_the_bytes_in_them(engine, service):
    before = read(engine, refused=False)
    for model in ("shout", "json", "spanish", "mirror"):  # three slots
        await (await service.start(body(model=model), stream=False, caller=Caller())).finished()
    after = read(engine, refused=False)
    copies = after.loads["slot"]
    assert copies.done - before.loads["slot"].done == (
        after.totals["lorafleet_adapter_misses_total", "slot"] - before.totals["lorafleet_adapter_misses_total", "slot"]
    )
    assert copies.done >= 1 and copies.seconds > 0
    held, pool = after.now["lorafleet_adapter_bytes", "slot"], engine.parts.slots
    assert held == sum(pool.layout.slab_elements(rank) for rank in pool.residency().adapters.values()) * 4
    assert 0 < held <= after.now["lorafleet_adapter_bytes_budget", "slot"] == pool.arena.nbytes


def test_a_reading_tells_of_the_disk(engine):
    now = read(engine, refused=False).now
    sizes = engine.parts.store.catalog.sources.disk.sizes()
    assert now["lorafleet_adapters", "disk"] == len(sizes)
    assert now["lorafleet_adapter_bytes", "disk"] == sum(sizes.values())
    assert now["lorafleet_adapter_bytes_budget", "disk"] == STORE.cache_bytes


def test_durations_between_readings_sum_up_and_lie_in_their_buckets():
    def total(*seconds: float) -> LoadTotals:
        return sum((LoadTotals.once(each, 1, done=each > 1) for each in seconds), LoadTotals())

    assert list(durations(total(), total())) == []
    before, new = total(0.03, 7.0), (0.042, 0.028, 0.049, 0.0005, 1e4)
    seen = list(durations(before, before + total(*new)))
    assert sum(seen) == pytest.approx(sum(new))
    assert total(*seen).by_seconds == total(*new).by_seconds
    assert list(durations(before, before + total(0.042))) == [pytest.approx(0.042)]


async def test_a_request_is_told_once_with_its_tokens_whether_whole_streamed_or_left(told):
    service, seen = told
    whole = await service.start(body(prompt=[PROMPT, PROMPT], n=2), stream=False, caller=Caller())
    await whole.finished()
    await whole.aclose()
    assert seen == [("shout", 200, whole.prompt_tokens, whole.completion_tokens)] and whole.completion_tokens > 0
    seen.clear()
    left = await service.start(body(max_tokens=400, ignore_eos=True), stream=True, caller=Caller())
    async for _ in left.chunks():
        break
    await left.aclose()
    (name, status, prompt_tokens, completion_tokens) = seen[0]
    assert (name, status, len(seen)) == ("shout", 200, 1) and prompt_tokens > 0 and 0 < completion_tokens < 400


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"model": "made-up"}, "", 404),
        ({"model": "hub:acme/made-up"}, "", 503),
        ({"n": 1000}, "", 400),
        ({"prompt": [5] * 600}, "shout", 400),
    ],
)
async def test_a_refusal_is_told_with_its_status_and_a_made_up_name_is_not(told, changes, name, status):
    service, seen = told
    with pytest.raises((ApiError, InvalidRequest, AdapterError)):
        await service.start(body(**changes), stream=False, caller=Caller())
    assert seen == [(name, status, 0, 0)]

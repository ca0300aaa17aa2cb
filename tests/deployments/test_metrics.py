"""What metrics are made of: readings of a real engine, and requests as clients had them."""

from __future__ import annotations

import asyncio

import pytest

from adapter_store.load_stats import SECONDS_BOUNDS, LoadTotals
from deployments.observability.catalog import GATEWAY, REPLICA
from deployments.observability.publisher import MetricPublisher
from deployments.observability.replica_metrics import read
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.request_record import RequestRecord
from deployments.protocol.completions import CompletionBody
from deployments.tenants.caller import Caller
from engine.histogram import Distribution, Histogram
from examples.demo.words import held_out_prompts

from .conftest import BASE_MODEL, STORE

PROMPT = held_out_prompts(1)[0]


async def complete(http, **changes):
    body = {"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes
    return await http.post("/v1/completions", json=body)


async def counted(metrics: RequestMetrics) -> dict[tuple[str, ...], float]:
    """Without the histograms, and without what every request moves."""
    return {key: value for key, value in (await metrics.read()).items() if not isinstance(value, Distribution)}


def test_a_reading_has_every_metric_of_a_replica_with_the_labels_it_should(engine):
    reading = read(engine, refused=True)
    assert {key[0] for key in reading} == {metric.name for metric in REPLICA}
    labels = {metric.name: len(metric.labels) for metric in REPLICA}
    assert all(len(key) - 1 == labels[key[0]] for key in reading)
    assert reading[("lorafleet_user_config_refused",)] == 1


async def test_requests_move_the_numbers_they_should(engine, http):
    before = read(engine, refused=False)
    for model in ("shout", "json", "spanish", "mirror", "shout"):  # three slots
        assert (await complete(http, model=model)).status_code == 200
    after = read(engine, refused=False)
    assert after["lorafleet_adapter_misses_total", "slot"] > before["lorafleet_adapter_misses_total", "slot"]
    assert after["lorafleet_tokens_total", "generated"] > before["lorafleet_tokens_total", "generated"]
    for name in ("adapter_wait", "queue", "prefill"):
        key = (f"lorafleet_{name}_seconds",)
        assert after[key].count == before[key].count + 5
    assert after[("lorafleet_adapter_slots",)] == after["lorafleet_adapters", "slot"] == 3
    assert after["lorafleet_adapter_bytes", "host"] > 0
    pages = engine.parts.pages
    assert after["lorafleet_kv_pages", "free"] + after["lorafleet_kv_pages", "used"] == pages.num_pages
    packs, first = (reading["lorafleet_adapter_load_seconds", "pack"] for reading in (after, before))
    done, packed = (reading["lorafleet_adapter_loads_total", "pack"] for reading in (after, before))
    assert packs.count - first.count == done - packed  # other tests' packing may have failed
    assert packs.count >= done >= 1 and packs.total > 0


async def test_a_reading_tells_of_the_copies_to_slots_and_of_the_bytes_in_them(engine, http):
    before = read(engine, refused=False)
    for model in ("shout", "json", "spanish", "mirror"):  # three slots
        assert (await complete(http, model=model)).status_code == 200
    after = read(engine, refused=False)
    copied, missed = (
        after[name, "slot"] - before[name, "slot"]
        for name in ("lorafleet_adapter_loads_total", "lorafleet_adapter_misses_total")
    )
    assert copied == missed >= 1 and after["lorafleet_adapter_load_seconds", "slot"].total > 0
    held, pool = after["lorafleet_adapter_bytes", "slot"], engine.parts.slots
    assert held == sum(pool.layout.slab_elements(rank) for rank in pool.residency().adapters.values()) * 4
    assert 0 < held <= after["lorafleet_adapter_bytes_budget", "slot"] == pool.arena.nbytes


def test_a_reading_tells_of_the_disk(engine):
    reading = read(engine, refused=False)
    sizes = engine.parts.store.catalog.sources.disk.sizes()
    assert reading["lorafleet_adapters", "disk"] == len(sizes)
    assert reading["lorafleet_adapter_bytes", "disk"] == sum(sizes.values())
    assert reading["lorafleet_adapter_bytes_budget", "disk"] == STORE.cache_bytes


async def test_a_request_is_told_once_with_its_tokens_whether_whole_or_streamed(http, metrics):
    used = (await complete(http, prompt=[PROMPT, PROMPT], n=2)).json()["usage"]
    told = {
        ("lorafleet_requests_open",): 0,
        ("lorafleet_adapter_requests_total", "shout", "200"): 1,
        ("lorafleet_adapter_tokens_total", "shout", "prompt"): used["prompt_tokens"],
        ("lorafleet_adapter_tokens_total", "shout", "completion"): used["completion_tokens"],
        ("lorafleet_tenant_requests_total", "", "200"): 1,
        ("lorafleet_tenant_tokens_total", "", "prompt"): used["prompt_tokens"],
        ("lorafleet_tenant_tokens_total", "", "completion"): used["completion_tokens"],
    }
    assert await counted(metrics) == told
    await complete(http, prompt=[PROMPT, PROMPT], n=2, stream=True)
    twice = {key: 2 * value for key, value in told.items()}
    assert await counted(metrics) == twice
    reading = await metrics.read()
    assert reading[("lorafleet_ttft_seconds",)].count == reading[("lorafleet_request_seconds",)].count == 2
    assert 0 < reading[("lorafleet_ttft_seconds",)].total < reading[("lorafleet_request_seconds",)].total
    assert {key[0] for key in reading} | {"lorafleet_requests_cut_total"} == {metric.name for metric in GATEWAY}


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"model": "made-up"}, "", 404),
        ({"model": "hub:acme/made-up"}, "", 503),
        ({"n": 100}, "", 400),
        ({"prompt": [5] * 600}, "shout", 400),
    ],
)
async def test_a_refusal_is_told_with_its_status_and_a_made_up_name_is_not(http, metrics, changes, name, status):
    assert (await complete(http, **changes)).status_code == status
    assert await counted(metrics) == {
        ("lorafleet_requests_open",): 0,
        ("lorafleet_adapter_requests_total", name, str(status)): 1,
        ("lorafleet_tenant_requests_total", "", str(status)): 1,
    }


async def test_an_answer_that_does_not_get_to_its_end_is_told_with_the_reason(http, metrics, fleet, monkeypatch):
    real = fleet.generate

    async def breaks(request, model, record):
        async for chunk in real(request, model, record):
            yield chunk
            raise ZeroDivisionError

    monkeypatch.setattr(fleet, "generate", breaks)
    assert (await complete(http, model=BASE_MODEL, stream=True)).status_code == 200
    cut = {key: value for key, value in (await metrics.read()).items() if key[0] == "lorafleet_requests_cut_total"}
    assert cut == {("lorafleet_requests_cut_total", "internal_error"): 1}


async def test_clients_that_leave_are_told_apart(service, metrics):
    body = CompletionBody(model="shout", prompt=PROMPT, max_tokens=400, ignore_eos=True)
    left = await service.start(body, stream=True, caller=Caller())
    async for _ in left.chunks():
        break
    await left.aclose()
    impatient = asyncio.ensure_future(service.start(body, stream=False, caller=Caller()))
    await asyncio.sleep(0)  # it begins
    assert metrics.open == 1
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    told = await counted(metrics)
    assert told[("lorafleet_requests_open",)] == 0 and told["lorafleet_requests_cut_total", "client_left"] == 1
    assert told["lorafleet_adapter_requests_total", "shout", "200"] == 1
    assert told["lorafleet_tenant_requests_total", "", "499"] == 1
    assert 0 < told["lorafleet_adapter_tokens_total", "shout", "completion"] < 400


async def test_names_beyond_the_cap_are_counted_together():
    metrics = RequestMetrics(adapters=2, tenants=1)
    for number in range(20):
        metrics.open += 1
        metrics.count(RequestRecord(model=f"m{number}", tenant=f"t{number}", status=200, prompt_tokens=3))
    by_tenant = {
        key[1]: value for key, value in (await metrics.read()).items() if key[0] == "lorafleet_tenant_tokens_total"
    }
    assert len(by_tenant) <= 3 and sum(by_tenant.values()) == 60 and by_tenant["other"] >= 51


class Series(dict):
    """What Ray was told, by series."""

    def __call__(self, name, *_):
        def put(value, labels, *, add):
            key = (name, *labels.values())
            self[key] = value + self.get(key, 0) * add

        class One:
            set = staticmethod(lambda value, labels: put(value, labels, add=False))
            inc = staticmethod(lambda value, labels: put(value, labels, add=True))

        return One


def test_counters_grow_by_what_came_and_histograms_are_as_prometheus_reads_them(monkeypatch):
    told = Series()
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(f"ray.serve.metrics.{kind}", told)
    publisher = MetricPublisher(REPLICA, read, 1.0)
    histogram = Histogram((0.5, 1.0))
    for total, value in ((3, 0.5), (3, 0.6), (10, 7.0)):
        histogram.observe(value)
        publisher.publish(
            {("lorafleet_tokens_total", "prompt"): total, ("lorafleet_adapter_load_seconds", "slot"): histogram.read()}
        )
    assert told == {
        ("lorafleet_tokens_total", "prompt"): 10,
        ("lorafleet_adapter_load_seconds_bucket", "slot", "0.5"): 1,
        ("lorafleet_adapter_load_seconds_bucket", "slot", "1"): 2,
        ("lorafleet_adapter_load_seconds_bucket", "slot", "+Inf"): 3,
        ("lorafleet_adapter_load_seconds_sum", "slot"): pytest.approx(8.1),
        ("lorafleet_adapter_load_seconds_count", "slot"): 3,
    }
    with pytest.raises(KeyError):
        publisher.publish({("lorafleet_made_up",): 1.0})


def test_loads_of_the_store_have_the_bounds_of_their_histogram():
    assert len(LoadTotals().by_seconds) == len(SECONDS_BOUNDS) + 1

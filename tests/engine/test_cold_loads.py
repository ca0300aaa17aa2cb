"""Law 6, by counting: while adapters come from slow sources and go through few slots, a running row misses no step."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine.flight import Flight
from engine.runner import Runner
from engine.scheduler import StepPlan
from tests.adapter_store.hub_server import Fault, HubServer
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, TinyAdapter, TinyModel, build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(model: TinyModel) -> list[TinyAdapter]:
    return [model.adapter(f"cold-{seed}", 16, ATTENTION, seed=seed) for seed in range(7)]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The requests in each step that was launched."""
    log: list[set[str]] = []
    launch = Runner.launch

    def launched(self: Runner, plan: StepPlan, *, always_lora: bool = False) -> Flight:
        log.append({row.sequence.request.request_id for row in plan.rows})
        return launch(self, plan, always_lora=always_lora)

    monkeypatch.setattr(Runner, "launch", launched)
    return log


async def test_law_6_a_running_row_is_in_every_step_while_cold_adapters_are_loaded(
    model: TinyModel,
    adapters: list[TinyAdapter],
    steps: list[set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    warm, *cold = adapters
    slab = 130_000  # bytes of one adapter of rank 16, and a bit
    with HubServer() as hub:
        for adapter in cold[::2]:
            files = {
                path.name: path.read_bytes() for path in adapter.path.iterdir() if path.name.startswith("adapter_")
            }
            hub.publish(f"acme/{adapter.name}", files)
        hub.fail(*(Fault("/cdn/", delay_s=0.1) for _ in cold[::2]))
        base = settings_for(model, adapters, slots={16: 2}, max_rows=6, num_pages=400)
        store = replace(
            base.store,
            allow=("hub:acme/*",),
            hub_endpoint=hub.endpoint,
            cache_dir=str(tmp_path / "cache"),
            host_cache_bytes=3 * slab,
        )
        async with running(replace(base, store=store, load_threads=2, download_threads=2)) as engine:
            rows = [ask("base", [5, 6], new=240, logprobs=0), ask("warm", [7, 8], warm, new=240, logprobs=0)]
            long = asyncio.create_task(answers(engine, rows))
            while engine.stats().running < 2:  # noqa: ASYNC110 (brought about by the engine's thread)
                await asyncio.sleep(0.001)
            requests = [
                ask(adapter.name, [9, 4, number], f"hub:acme/{adapter.name}" if number % 2 == 0 else adapter, new=3)
                for number, adapter in enumerate(cold)
            ]
            got = await answers(engine, [replace(r, sampling=replace(r.sampling, logprobs=0)) for r in requests])
            base_row, warm_row = await long
            stats = engine.stats()
    for request, adapter, chunk in zip(requests, cold, got, strict=True):
        assert_same(chunk, expected(model, request.prompt_token_ids, adapter, 3))
    assert_same(base_row, expected(model, [5, 6], None, 240))
    assert_same(warm_row, expected(model, [7, 8], warm, 240))
    assert stats.slot_evictions >= len(cold) - 1, "one slot went from one cold adapter to the next"
    assert stats.host_bytes <= stats.host_budget_bytes == 3 * slab
    for name in ("base", "warm"):
        taken = [number for number, rows_of_step in enumerate(steps) if name in rows_of_step]
        assert taken == list(range(taken[0], taken[-1] + 1)), "a step went by without it"
        assert len(taken) == 240
    beside = {adapter.name for adapter in cold for together in steps if {"base", "warm", adapter.name} <= together}
    assert beside, "the cold ones did not run beside the others"


async def test_what_is_copied_before_its_turn_is_served_as_its_own(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    """One row at a time: the adapters of those who wait are in their slots long before."""
    async with running(settings_for(model, adapters, slots={16: 4}, max_rows=1, poison=True)) as engine:
        long = asyncio.create_task(answer(engine, ask("long", [5], new=120)))
        while engine.stats().running < 1:  # noqa: ASYNC110 (brought about by the engine's thread)
            await asyncio.sleep(0.001)
        waiting = [asyncio.create_task(answer(engine, ask(a.name, [6, 7], a, new=4, logprobs=0))) for a in adapters[:6]]
        while engine.stats().prefetches < 4 and not long.done():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        stats = engine.stats()
        assert stats.slots_in_use == 0
        for adapter, task in zip(adapters, waiting, strict=False):
            assert_same(await task, expected(model, [6, 7], adapter, 4))
        await long
        assert engine.stats().slot_misses == 6
    assert stats.prefetches == 4

"""What must hold whoever shares the batch, on the running engine: each test fails when its law is broken."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused
from adapter_store.settings import StoreSettings
from engine.engine import Engine
from engine.request import GenerationChunk, GenerationRequest, InvalidRequest
from engine.step_shapes import step_shapes
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, MLP, TinyAdapter, TinyModel

MakeModel = Callable[..., TinyModel]


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapters(model: TinyModel) -> list[TinyAdapter]:
    """Ranks 4, 8 and 16, each on other modules."""
    return [
        model.adapter("r4", 4, ("q_proj", "v_proj", "o_proj"), seed=1),
        model.adapter("r8", 8, ATTENTION, seed=2, use_rslora=True),
        model.adapter("r16", 16, ATTENTION + MLP, seed=3),
        model.adapter("mlp8", 8, MLP, seed=4, alpha=4),
    ]


def traffic(adapters: list[TinyAdapter], count: int = 10, new: int = 8, **sampling: Any) -> list[GenerationRequest]:
    """Prompts of 1 to 40 tokens, over all adapters and the base model."""
    rng = random.Random(7)
    return [
        ask(
            f"r{index}",
            [rng.randrange(3, 211) for _ in range(rng.choice((1, 3, 9, 17, 40)))],
            (*adapters, None)[index % (len(adapters) + 1)],
            new=new,
            **sampling,
        )
        for index in range(count)
    ]


def by_name(adapters: list[TinyAdapter]) -> dict[str | None, TinyAdapter | None]:
    return {None: None, **{adapter.name: adapter for adapter in adapters}}


def close_to(got: GenerationChunk, want: GenerationChunk) -> None:
    """The same tokens and, to rounding, the same log probabilities."""
    assert got.token_ids == want.token_ids
    assert [a.logprob for a in got.logprobs] == pytest.approx([b.logprob for b in want.logprobs], abs=2e-5)


async def test_law_1_a_mixed_batch_equals_transformers_and_peft(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    requests = traffic(adapters, logprobs=0)
    async with running(settings_for(model, adapters)) as engine:
        got = await answers(engine, requests)
        assert engine.stats().steps < sum(len(chunk.token_ids) for chunk in got), "nothing was batched"
    for request, chunk in zip(requests, got, strict=True):
        adapter = by_name(adapters)[request.adapter]
        assert_same(chunk, expected(model, request.prompt_token_ids, adapter, 8))


async def test_law_2_neighbours_slots_eviction_chunks_and_preemption_change_nothing(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    requests = traffic(adapters, logprobs=0)
    async with running(settings_for(model, adapters, max_batch_tokens=512, slots={16: 8})) as engine:
        alone = [await answer(engine, request) for request in requests]
    cramped = settings_for(model, adapters, max_batch_tokens=9, slots={16: 2}, num_pages=14)
    async with running(cramped) as engine:
        for turn in range(3):  # adapters are evicted and come back in other slots
            order = requests[turn:] + requests[:turn]
            for request, chunk in zip(order, await answers(engine, order), strict=True):
                close_to(chunk, alone[requests.index(request)])
        stats = engine.stats()
    assert stats.slot_evictions > 4
    assert stats.preemptions > 0


async def test_law_1_and_2_hold_in_padded_steps(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    """Every step padded to one of the shapes that a GPU captures, prompts in chunks of several sizes."""
    requests = traffic(adapters, logprobs=0)
    settings = settings_for(model, adapters, max_batch_tokens=40, max_mixed_tokens=7, slots={16: 2}, num_pages=24)
    async with running(settings) as engine:
        parts = engine.parts
        shapes = step_shapes(settings.max_rows, (8, 16, 40), settings.max_mixed_tokens)
        parts.runner.capture(shapes, -(-parts.max_model_len // settings.page_size))
        assert parts.runner.graphs is not None
        got = await answers(engine, requests)
        assert engine.stats().slot_evictions > 0
    for request, chunk in zip(requests, got, strict=True):
        adapter = by_name(adapters)[request.adapter]
        assert_same(chunk, expected(model, request.prompt_token_ids, adapter, 8))


async def test_law_3_a_seeded_draw_depends_on_seed_position_and_logits_alone(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    drawn = [
        replace(request, sampling=replace(request.sampling, temperature=1.3, seed=41 + index, top_p=0.95))
        for index, request in enumerate(traffic(adapters, new=12))
    ]
    async with running(settings_for(model, adapters)) as engine:
        alone = [await answer(engine, request) for request in drawn]
        together = await answers(engine, drawn)
    async with running(settings_for(model, adapters, num_pages=16, slots={16: 1}, max_batch_tokens=11)) as engine:
        cramped = await answers(engine, drawn[::-1])
        assert engine.stats().preemptions > 0
    tokens = [chunk.token_ids for chunk in alone]
    assert tokens == [chunk.token_ids for chunk in together] == [chunk.token_ids for chunk in cramped[::-1]]
    assert len(set(tokens)) == len(tokens)
    greedy = expected(model, drawn[4].prompt_token_ids, None, 12)
    assert alone[4].token_ids != greedy.tokens, "temperature 1.3 drew nothing but the likeliest tokens"


@pytest.mark.parametrize("prefix_cache", [False, True])
async def test_law_4_poisoned_pages_and_slots_reach_no_output(
    model: TinyModel, adapters: list[TinyAdapter], prefix_cache: bool
) -> None:
    requests = traffic(adapters, logprobs=0)
    async with running(settings_for(model, adapters, slots={16: 8})) as engine:
        want = await answers(engine, requests)
    values = {"slots": {4: 1, 16: 2}, "num_pages": 20, "poison": True, "prefix_cache": prefix_cache}
    poisoned = settings_for(model, adapters, **values)
    async with running(poisoned) as engine:
        parts = engine.parts
        assert torch.isnan(parts.runner.kv.keys[0]).all(), "fresh pages are not poisoned"
        for _ in range(2):
            for chunk, reference in zip(await answers(engine, requests), want, strict=True):
                close_to(chunk, reference)
        assert engine.stats().free_pages == 20
        pages = torch.isnan(parts.runner.kv.keys[0]).flatten(1).all(1)
        assert pages.all() == (not prefix_cache), "only pages kept for their content are not poisoned"


def spoil(adapter: TinyAdapter, folder: Path, value: float) -> Path:
    """A copy of the adapter whose B of one module holds ``value``."""
    folder.mkdir(parents=True)
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    key = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((adapter.path / "adapter_config.json").read_bytes())
    return folder


async def test_law_5_an_adapter_that_overflows_while_its_row_is_preempted(
    model: TinyModel, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    """Its row may be in the queue again when the draw that cannot be used is read."""
    spoilt = spoil(adapters[0], tmp_path / "spoilt", 1e38)
    store = StoreSettings(root=tmp_path, adapters={"spoilt": f"local:{spoilt}"})
    cramped = settings_for(model, (), num_pages=8, max_model_len=32, max_rows=4, max_batch_tokens=32, store=store)
    async with running(cramped) as engine:

        async def keep_asking() -> None:
            for number in range(60):
                with pytest.raises(AdapterRefused, match="not finite"):
                    await answer(engine, ask(f"bad-{number}", range(3, 9), "spoilt", new=8))

        bad = asyncio.create_task(keep_asking())
        good = [await answer(engine, ask(f"good-{number}", range(5, 9), new=27)) for number in range(12)]
        await bad
        stats = engine.stats()
    assert stats.healthy
    assert stats.free_pages == stats.num_pages
    assert {chunk.token_ids for chunk in good} == {expected(model, range(5, 9), None, 27).tokens}


async def test_law_5_a_bad_neighbour_changes_nothing(
    model: TinyModel, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    good = traffic(adapters, logprobs=0)
    # Finite, so it is loaded; but the product overflows fp32, and the row's logits are no numbers.
    overflow = TinyAdapter(spoil(adapters[2], tmp_path / "overflow", 1e38), 16)
    nan = TinyAdapter(spoil(adapters[2], tmp_path / "nan", float("nan")), 16)
    everyone = [*adapters, overflow, nan]
    async with running(settings_for(model, adapters, slots={16: 8})) as engine:
        want = await answers(engine, good)
    async with running(settings_for(model, everyone, slots={16: 8})) as engine:

        async def refused(request: GenerationRequest, error: type[Exception], match: str) -> None:
            with pytest.raises(error, match=match):
                await answer(engine, request)

        async def leaves(request: GenerationRequest) -> None:
            stream = engine.generate(request)
            async for _ in stream:
                break
            await stream.aclose()

        *got, _, _, _, _, _, _ = await asyncio.gather(
            *(answer(engine, request) for request in good),
            refused(ask("nan", [5, 6], nan), AdapterRefused, "nan"),
            refused(ask("overflow", [5, 6], overflow), AdapterRefused, "overflow.*not finite"),
            refused(ask("unknown", [5, 6], "nobody"), AdapterNotFound, "nobody"),
            refused(ask("long", [5] * 300), InvalidRequest, "300"),
            refused(ask("vocabulary", [5, 211]), InvalidRequest, "211"),
            leaves(ask("gone", [7, 8], adapters[0], new=200)),
        )
        for chunk, reference in zip(got, want, strict=True):
            assert chunk is not None
            close_to(chunk, reference)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_for_adapter) == (0, 0, 0)
    assert stats.free_pages == stats.num_pages
    assert stats.healthy


@pytest.fixture
def silent_hub() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """A Hub that says nothing to anyone until released, then that there is no such repository.

    Yields its address, an event set by the first question, and the event that releases it.
    """
    asked, released = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            released.wait(30)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
            """Not to the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked, released
    released.set()
    server.shutdown()
    server.server_close()
    thread.join()


async def test_law_5_sources_that_do_not_answer_hold_up_no_adapter_that_is_here(
    model: TinyModel, adapters: list[TinyAdapter], silent_hub: tuple[str, threading.Event, threading.Event]
) -> None:
    address, asked, released = silent_hub
    base = settings_for(model, adapters)
    store = replace(
        base.store,
        allow=("hub:acme/*",),
        hub_endpoint=address,
        hub_timeout_s=60,
        hub_retries=0,
        cache_dir=str(model.path.parent / "silent-cache"),
    )
    async with running(replace(base, store=store, load_threads=1, download_threads=1)) as engine:
        # One tenant's silent adapters take all the threads for downloads.
        cold = [asyncio.create_task(answer(engine, ask(f"cold{i}", [3, 4], f"hub:acme/silent{i}"))) for i in range(3)]
        await asyncio.to_thread(asked.wait, 30)
        requests = traffic(adapters, logprobs=0)
        for request, chunk in zip(requests, await answers(engine, requests), strict=True):
            assert_same(chunk, expected(model, request.prompt_token_ids, by_name(adapters)[request.adapter], 8))
        assert not any(task.done() for task in cold)
        released.set()
        for task in cold:
            with pytest.raises(AdapterError):
                await task


async def test_law_6_only_the_request_waits_whose_adapter_is_on_its_way(
    model: TinyModel, adapters: list[TinyAdapter], silent_hub: tuple[str, threading.Event, threading.Event]
) -> None:
    address, asked, released = silent_hub
    base = settings_for(model, adapters)
    store = StoreSettings(
        root=base.store.root,
        adapters=base.store.adapters,
        allow=("hub:acme/*",),
        hub_endpoint=address,
        hub_timeout_s=60,
        hub_retries=0,
        cache_dir=str(model.path.parent / "hub-cache"),
    )
    async with running(replace(base, store=store, load_threads=2)) as engine:
        # Many requests for one silent adapter take one of the two loading threads, not both.
        cold = [asyncio.create_task(answer(engine, ask(f"cold{i}", [3, 4], "hub:acme/silent"))) for i in range(5)]
        await asyncio.to_thread(asked.wait, 30)
        for request, chunk in zip(
            requests := traffic(adapters, logprobs=0), await answers(engine, requests), strict=True
        ):
            adapter = by_name(adapters)[request.adapter]
            assert_same(chunk, expected(model, request.prompt_token_ids, adapter, 8))
        stats = engine.stats()
        assert (stats.waiting_for_adapter, stats.running, stats.waiting) == (5, 0, 0)
        assert not any(task.done() for task in cold)
        released.set()
        for task in cold:
            with pytest.raises(AdapterError):
                await task
        assert engine.stats().waiting_for_adapter == 0


async def test_a_resident_adapter_runs_although_its_source_and_its_host_copy_are_gone(
    model: TinyModel, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    folder = tmp_path / "tenant"
    shutil.copytree(adapters[0].path, folder)
    tenant, other = TinyAdapter(folder, 4), adapters[1]
    async with running(settings_for(model, [tenant, other], slots={16: 1})) as engine:
        await answer(engine, ask("first", [5, 6], tenant))
        (digest,) = engine.stats().resident
        drop_host_copies(engine)
        assert engine.stats().host_cached == ()
        shutil.rmtree(folder)
        got = await answers(
            engine, [ask(f"{i}", [7 + i, 8], f"local:{folder}", digest=digest, logprobs=0) for i in range(3)]
        )
        for i, chunk in enumerate(got):
            assert_same(chunk, expected(model, [7 + i, 8], adapters[0], 8))
        assert (engine.stats().slot_hits, engine.stats().slot_misses) == (3, 1)

        neighbour = asyncio.create_task(answer(engine, ask("neighbour", [9], other, new=60, logprobs=0)))
        while digest in engine.stats().resident:  # noqa: ASYNC110 (brought about by the engine's thread)
            await asyncio.sleep(0.001)
        with pytest.raises(AdapterNotFound, match=r"tenant.*any more"):
            await answer(engine, ask("late", [7, 8], f"local:{folder}", digest=digest))
        assert_same(await neighbour, expected(model, [9], other, 60))
        stats = engine.stats()
        slots = engine.parts.slots
        assert slots is not None
        assert all(slot.refs == 0 for slot in slots._slots)
    assert (stats.running, stats.waiting, stats.waiting_for_adapter) == (0, 0, 0)
    assert stats.free_pages == stats.num_pages


async def test_requests_that_rely_on_a_slot_are_refused_alone_when_another_takes_it(
    model: TinyModel, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    """Queued behind a full batch when the adapter is evicted: those without a source fail, nobody else does."""
    folder = tmp_path / "tenant"
    shutil.copytree(adapters[0].path, folder)
    tenant, other = TinyAdapter(folder, 4), adapters[1]
    async with running(settings_for(model, [tenant, other], slots={16: 1}, max_rows=1)) as engine:
        await answer(engine, ask("first", [5, 6], tenant))
        (digest,) = engine.stats().resident
        drop_host_copies(engine)
        shutil.rmtree(folder)

        async def relies(number: int) -> GenerationChunk | AdapterError:
            try:
                return await answer(
                    engine, ask(f"relies{number}", [7, 8], f"local:{folder}", digest=digest, logprobs=0)
                )
            except AdapterError as error:
                return error

        async def others(number: int) -> GenerationChunk:
            return await answer(engine, ask(f"other{number}", [9, 4], (other, None)[number % 2], logprobs=0))

        results = await asyncio.gather(*(one(number) for number in range(4) for one in (relies, others)))
        want = {None: expected(model, [9, 4], None, 8), other: expected(model, [9, 4], other, 8)}
        for number, chunk in enumerate(results[1::2]):
            assert isinstance(chunk, GenerationChunk)
            assert_same(chunk, want[(other, None)[number % 2]])
        first, *later = results[::2]
        assert isinstance(first, GenerationChunk)
        assert_same(first, expected(model, [7, 8], adapters[0], 8))
        assert all(isinstance(error, AdapterNotFound) for error in later)
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_for_adapter) == (0, 0, 0)
    assert stats.healthy


def drop_host_copies(engine: Engine) -> None:
    """As when others take the room."""
    store = engine.parts.store
    assert store is not None
    store.host_cache.clear()


@pytest.mark.parametrize(("host_cache_bytes", "warned"), [(120_000, True), (1 << 30, False)])
async def test_a_host_cache_smaller_than_the_slots_is_told_once_at_the_start(
    model: TinyModel,
    adapters: list[TinyAdapter],
    caplog: pytest.LogCaptureFixture,
    host_cache_bytes: int,
    warned: bool,
) -> None:
    base = settings_for(model, adapters)
    async with running(replace(base, store=replace(base.store, host_cache_bytes=host_cache_bytes))) as engine:
        await answer(engine, ask("x", [5], adapters[0], new=2))
        slots = engine.parts.slots
        assert slots is not None
        slot_bytes = slots.arena.nbytes
    told = [record for record in caplog.records if "host_cache_bytes" in record.getMessage()]
    assert len(told) == warned
    with pytest.raises(ValueError, match="host_cache_bytes is 100000 but one adapter of rank 16 needs"):
        await Engine(replace(base, store=replace(base.store, host_cache_bytes=100_000))).start()
    for record in told:
        assert record.levelname == "WARNING"
        assert f"is {host_cache_bytes} " in record.getMessage()
        assert f"{slot_bytes} " in record.getMessage()
        assert "raise it" in record.getMessage()


@pytest.mark.parametrize(("slots", "hot_adapters"), [(1, 1), (1, 3), (2, 3)])
async def test_law_7_a_cold_tenant_is_served_under_a_saturating_hot_one(
    model: TinyModel, adapters: list[TinyAdapter], slots: int, hot_adapters: int
) -> None:
    hot, cold = (adapters[0], adapters[2], adapters[3])[:hot_adapters], adapters[1]
    limits = settings_for(model, adapters, slots={16: slots}, max_rows=4, max_overtakes=3)
    finished_hot = 0
    stop_at = 300  # were the cold tenant never served

    async def keep_busy(worker: int) -> None:
        nonlocal finished_hot
        count = 0
        while finished_hot < stop_at:
            # Lengths differ, so that the hot adapter's rows never all end in the same step.
            new, adapter = 7 + (3 * count + 5 * worker) % 11, hot[(count + worker) % len(hot)]
            await answer(engine, replace(ask(f"hot{worker}-{count}", [5, 6, 7], adapter, new=new), tenant="hot"))
            finished_hot += 1
            count += 1

    async with running(limits) as engine:
        workers = [asyncio.create_task(keep_busy(worker)) for worker in range(8)]
        while finished_hot < 10:  # noqa: ASYNC110 (a count that others raise)
            await asyncio.sleep(0.005)
        before = finished_hot
        got = await answer(engine, ask("cold", [8, 9], cold, new=6, logprobs=0))
        passed = finished_hot - before
        stop_at = 0
        await asyncio.gather(*workers)
    assert_same(got, expected(model, [8, 9], cold, 6))
    # At most: the 8 that were there already, 3 overtakers, and 4 more admitted in the step that saw the third.
    assert passed <= 8 + 3 + 4

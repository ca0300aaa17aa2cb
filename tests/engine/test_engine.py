"""The running engine on a CPU: the demo model's tenants, stopping, log probabilities, leaving, limits and failures."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_store.errors import AdapterChanged, AdapterRefused
from adapter_store.settings import StoreSettings
from adapter_store.slots import Residency
from engine.engine import Engine
from engine.request import CONTEXT_LENGTH_EXCEEDED, EngineDead, EngineOverloaded, GenerationChunk, InvalidRequest
from engine.settings import EngineSettings
from engine.stats import EngineLoad
from examples.demo.words import ADAPTERS, held_out_prompts
from examples.demo.words import answer as demo_answer
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import TinyAdapter, TinyModel

MakeModel = Callable[..., TinyModel]
ROOT = Path(__file__).parents[2]


def demo_settings(**overrides: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "model": str(ROOT / "examples/demo/model"),
        "model_name": "lorafleet-demo",
        "device": "cpu",
        "cpu_threads": 1,
        "max_rows": 16,
        "max_batch_tokens": 128,
        "slots": {8: 2, 16: 2},
        "store": StoreSettings(root=ROOT, folders=("examples/demo/adapters",)),
    }
    return EngineSettings(**{**values, **overrides})


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapter(model: TinyModel) -> TinyAdapter:
    return model.adapter("one", 8, seed=5)


@pytest.fixture
async def demo() -> AsyncIterator[Engine]:
    async with running(demo_settings()) as engine:
        yield engine


@pytest.fixture
async def engine(model: TinyModel, adapter: TinyAdapter) -> AsyncIterator[Engine]:
    async with running(settings_for(model, [adapter])) as engine:
        yield engine


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.001)


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    slots = engine.parts.slots
    assert slots is not None
    return (
        (stats.running, stats.waiting, stats.waiting_for_adapter) == (0, 0, 0)
        and stats.free_pages == stats.num_pages
        and all(slot.refs == 0 for slot in slots._slots)
    )


# --- the demo's tenants ---------------------------------------------------------------------------------------------


async def test_every_tenant_of_one_mixed_batch_gets_its_own_exact_text(demo: Engine) -> None:
    cases = [(prompt, style) for prompt in held_out_prompts(4) for style in ("base", *ADAPTERS)]
    requests = [
        ask(
            f"{style}: {prompt}",
            demo.tokenizer.encode(prompt),
            None if style == "base" else style,
            new=60,
            ignore_eos=False,
        )
        for prompt, style in cases
    ]
    got = await answers(demo, requests)
    assert [chunk.text for chunk in got] == [demo_answer(prompt, style) for prompt, style in cases]
    assert {chunk.finish_reason for chunk in got} == {"stop"}
    assert all(chunk.token_ids[-1] in demo.parts.eos_token_ids for chunk in got)
    stats = demo.stats()
    assert stats.steps < 150, "the rows were not batched"
    assert stats.generated_tokens == sum(chunk.completion_tokens for chunk in got)
    assert stats.prompt_tokens == sum(len(request.prompt_token_ids) for request in requests)
    assert len(stats.resident) == len(stats.host_cached) == 4
    assert stats.slot_misses == 4
    assert stats.slot_hits == 12 + stats.prefetches
    assert idle(demo)


async def test_more_tenants_than_slots_and_than_pages() -> None:
    cases = [(prompt, style) for prompt in held_out_prompts(3) for style in (*ADAPTERS, "base")]
    async with running(
        demo_settings(slots={16: 1}, num_pages=20, page_size=4, max_model_len=80, poison=True)
    ) as engine:
        got = await answers(
            engine,
            [
                ask(
                    f"{i}",
                    engine.tokenizer.encode(prompt),
                    None if style == "base" else style,
                    new=45,
                    ignore_eos=False,
                )
                for i, (prompt, style) in enumerate(cases)
            ],
        )
        stats = engine.stats()
    assert [chunk.text for chunk in got] == [demo_answer(prompt, style) for prompt, style in cases]
    assert stats.slot_evictions >= 3
    assert stats.preemptions >= 1


async def test_a_chat_streams_whole_characters(demo: Engine) -> None:
    prompt = "penguin, small, eats, school"
    tokens = demo.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    chunks = [chunk async for chunk in demo.generate(ask("chat", tokens, "spanish", new=60, ignore_eos=False))]
    text = demo_answer(prompt, "spanish")
    assert "".join(chunk.text for chunk in chunks) == text
    assert "ñ" in text and "ü" in text
    assert not any("\ufffd" in chunk.text for chunk in chunks)
    assert chunks[0].completion_tokens >= 1
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.prompt_tokens == len(tokens) for chunk in chunks)


# --- stopping and log probabilities ---------------------------------------------------------------------------------


async def test_stop_strings_stop_tokens_and_lengths(demo: Engine) -> None:
    tokens = demo.tokenizer.encode("robot, old, eats, school")
    whole = await answer(demo, ask("whole", tokens, new=60, ignore_eos=False))
    assert whole.text == "The old robot eats in the school."
    assert (whole.finish_reason, whole.stop_reason) == ("stop", None)

    stopped = await answer(demo, ask("string", tokens, new=60, stop=("zzz", "ts in")))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("The old robot ea", "stop", "ts in")

    token = whole.token_ids[3]
    by_id = await answer(demo, ask("id", tokens, new=60, stop_token_ids=(token,)))
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token)
    assert by_id.token_ids == whole.token_ids[:4]
    assert by_id.text == demo.tokenizer.decode(whole.token_ids[:3])

    short = await answer(demo, ask("short", tokens, new=3))
    assert (short.text, short.finish_reason) == (demo.tokenizer.decode(whole.token_ids[:3]), "length")
    # Text that may become a stop string is given out when the end comes first.
    held = await answer(demo, ask("held", tokens, new=60, stop=("school.!",), ignore_eos=False))
    assert (held.text, held.stop_reason) == (whole.text, None)

    on = await answer(demo, ask("on", tokens, new=len(whole.token_ids) + 3, ignore_eos=True))
    assert on.token_ids[: len(whole.token_ids)] == whole.token_ids
    assert on.finish_reason == "length"


async def test_a_context_that_is_full_ends_the_request(model: TinyModel) -> None:
    async with running(settings_for(model, max_model_len=40)) as engine:
        got = await answer(engine, ask("full", [5] * 30, new=None))
        assert (got.finish_reason, got.completion_tokens) == ("length", 10)
        exact = await answer(engine, ask("exact", [5] * 39, new=1))
        assert exact.completion_tokens == 1
    want = expected(model, [5] * 30, None, 10)
    assert got.token_ids == want.tokens


@pytest.mark.parametrize("top", [0, 1, 5])
async def test_logprobs_equal_log_softmax(engine: Engine, model: TinyModel, adapter: TinyAdapter, top: int) -> None:
    prompt = [7, 8, 9]
    # Beside a row that asks for another number and one that asks for none.
    got, *_ = await answers(
        engine,
        [
            ask("a", prompt, adapter, new=5, logprobs=top, temperature=0.7, seed=3),
            ask("b", [3], logprobs=20),
            ask("c", [4]),
        ],
    )
    tokens = list(prompt)
    for token, entry in zip(got.token_ids, got.logprobs, strict=True):
        values = torch.log_softmax(model.logits(tokens, adapter)[-1].float(), dim=-1)
        assert (entry.token_id, entry.text) == (token, f"t{token}")
        assert entry.logprob == pytest.approx(float(values[token]), abs=2e-5)
        best = values.topk(top)
        assert [one[0] for one in entry.top] == best.indices.tolist()
        assert [one[1] for one in entry.top] == pytest.approx(best.values.tolist(), abs=2e-5)
        assert [one[2] for one in entry.top] == [f"t{index}" for index in best.indices.tolist()]
        tokens.append(token)


async def test_the_largest_values_that_are_taken_break_nothing(engine: Engine) -> None:
    huge = 2**63 - 1
    for extreme in ({"top_k": huge}, {"seed": huge}, {"stop_token_ids": (2**70,)}, {"temperature": 1e-300}):
        drawn = ask("x", [5], **{"temperature": 100.0, "top_p": 1e-9, "logprobs": 20, **extreme})
        assert (await answer(engine, drawn)).completion_tokens == 8
    with pytest.raises(InvalidRequest, match="to 255 or less"):
        await answer(engine, ask("x", [5], new=2**70))


async def test_unseeded_requests_differ_and_the_engine_seed_repeats_them(model: TinyModel) -> None:
    async def draw(engine: Engine) -> list[tuple[int, ...]]:
        return [(await answer(engine, ask(f"{i}", [9], temperature=1.0, new=12))).token_ids for i in range(3)]

    async with running(settings_for(model, seed=11)) as engine:
        first = await draw(engine)
    async with running(settings_for(model, seed=11)) as engine:
        assert await draw(engine) == first
    assert len(set(first)) == 3


# --- what others are told -------------------------------------------------------------------------------------------


async def test_the_load_counts_rows_their_ranks_and_the_slots_that_can_be_given(
    model: TinyModel, adapter: TinyAdapter
) -> None:
    async with running(settings_for(model, [adapter], max_rows=2, slots={16: 2})) as engine:
        assert engine.load() == EngineLoad(0, 0, 0, ((16, 2),))
        asked = [ask("one", [5], adapter, new=200), ask("two", [5], new=200), ask("three", [5], adapter, new=200)]
        tasks = [asyncio.create_task(answer(engine, request)) for request in asked]
        await until(lambda: engine.load().running == 2 and engine.load().waiting == 1)
        ranks = engine.load().ranks
        assert ranks in (adapter.rank, 2 * adapter.rank)
        assert engine.load().free_slots == ((16, 1),)
        await asyncio.gather(*tasks)
        await until(lambda: engine.load() == EngineLoad(0, 0, 0, ((16, 2),)))


async def test_the_longest_wait_is_of_those_who_wait_now(model: TinyModel) -> None:
    async with running(settings_for(model, [], max_rows=1)) as engine:
        first = asyncio.create_task(answer(engine, ask("first", [5], new=250)))
        await until(lambda: engine.load().running == 1)
        assert engine.stats().longest_wait_s == 0
        second = asyncio.create_task(answer(engine, ask("second", [5], new=4)))
        await until(lambda: engine.stats().longest_wait_s > 0.02)
        waited = engine.stats().longest_wait_s
        assert waited < engine.stats().longest_wait_s or second.done() or first.done()
        await asyncio.gather(first, second)
        assert engine.stats().longest_wait_s == 0


# --- leaving --------------------------------------------------------------------------------------------------------


async def test_leaving_frees_pages_and_slot_by_the_next_step(engine: Engine, adapter: TinyAdapter) -> None:
    other = asyncio.create_task(answer(engine, ask("other", [5], new=200)))
    await until(lambda: engine.stats().running == 1)
    stream = engine.generate(ask("leaving", [5] * 20, adapter, new=200))
    async for _ in stream:
        break
    leaving = engine._started()._sequences["leaving"]
    slot = leaving.slot
    assert slot is not None
    assert slot.refs == 1
    assert leaving.pages
    await stream.aclose()
    had = len(leaving.tokens)
    await until(lambda: engine.stats().running == 1)
    assert len(leaving.tokens) <= had + 1, "it was part of a step after the one under way"
    assert (leaving.pages, leaving.slot, slot.refs) == ([], None, 0)
    await other
    assert idle(engine)


@pytest.mark.parametrize("when", ["at once", "while waiting", "while loading"])
async def test_a_cancelled_reader_leaves_nothing_behind(model: TinyModel, adapter: TinyAdapter, when: str) -> None:
    async with running(settings_for(model, [adapter], max_rows=1)) as engine:
        other: asyncio.Task[GenerationChunk] | None = None
        if when == "while waiting":
            other = asyncio.create_task(answer(engine, ask("other", [5], new=100)))
            await until(lambda: engine.stats().running == 1)
        task = asyncio.create_task(answer(engine, ask("leaving", [5], adapter, new=200)))
        if when == "while waiting":
            await until(lambda: engine.stats().waiting == 1)
        elif when == "while loading":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if other is not None:
            assert (await other).completion_tokens == 100
        await until(lambda: idle(engine))
        assert (await answer(engine, ask("leaving", [5], adapter, new=2))).completion_tokens == 2


async def test_abort_ends_the_stream_with_its_reason(engine: Engine) -> None:
    chunks: list[GenerationChunk] = []
    async for chunk in engine.generate(ask("x", [5], new=200)):
        chunks.append(chunk)
        engine.abort("x")
    engine.abort("x")  # means nobody: not the next request of this name
    assert (await answer(engine, ask("x", [5], new=2))).completion_tokens == 2
    assert chunks[-1].finish_reason == "abort"
    assert chunks[-1].completion_tokens == sum(len(chunk.token_ids) for chunk in chunks) < 200
    engine.abort("x")
    engine.abort("nobody")
    assert (await answer(engine, ask("x", [5], new=2))).completion_tokens == 2
    assert idle(engine)


# --- threads and event loops ----------------------------------------------------------------------------------------


async def test_generating_does_not_starve_the_event_loop(engine: Engine) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    before = engine.stats().steps
    await answers(engine, [ask(f"{i}", [5] * 10, new=200) for i in range(8)])
    steps = engine.stats().steps - before
    ticker.cancel()
    # Counted against steps, not the clock: the loop turns at least once in two steps of a few milliseconds.
    assert steps >= 200
    assert ticks >= steps / 2


async def test_a_slow_reader_gets_what_came_meanwhile_as_one_chunk(engine: Engine) -> None:
    stream = engine.generate(ask("slow", [5], new=50, logprobs=0))
    first = await anext(stream)
    await until(lambda: engine.stats().running == 0)
    await asyncio.sleep(0.01)
    rest = [chunk async for chunk in stream]
    assert len(rest) == 1
    assert rest[0].completion_tokens == 50
    assert len(first.token_ids) + len(rest[0].token_ids) == 50
    assert len(rest[0].logprobs) == len(rest[0].token_ids)


def test_several_event_loops_share_one_engine(model: TinyModel, adapter: TinyAdapter) -> None:
    engine = Engine(settings_for(model, [adapter]))
    asyncio.run(engine.start())
    results: dict[int, list[GenerationChunk]] = {}

    def reader(number: int) -> None:
        requests = [ask(f"{number}-{i}", [5, number], (None, adapter)[i % 2]) for i in range(4)]
        results[number] = asyncio.run(answers(engine, requests))

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (base, adapted, *_) in results.items():
        assert base.token_ids == expected(model, [5, number], None, 8).tokens
        assert adapted.token_ids == expected(model, [5, number], adapter, 8).tokens
    assert len(results) == 4

    async def abandon() -> None:
        stream = engine.generate(ask("abandoned", [5], new=250))
        await anext(stream)
        stop_finalizers = asyncio.get_running_loop()
        stop_finalizers.shutdown_asyncgens = lambda: asyncio.sleep(0)  # the loop closes without closing its streams
        kept.append(stream)

    kept: list[Any] = []
    asyncio.run(abandon())
    deadline = time.monotonic() + 30
    while not idle(engine) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.stats().generated_tokens < 4 * 4 * 8 + 250
    assert idle(engine)
    asyncio.run(engine.close())


async def test_an_idle_engine_takes_no_time(engine: Engine) -> None:
    await answer(engine, ask("x", [5]))
    steps, started = engine.stats().steps, time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - started < 0.1
    assert engine.stats().steps == steps


# --- limits and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_args", "param", "match"),
    [
        ({"prompt": []}, "prompt", "no tokens"),
        ({"prompt": [5] * 256}, "prompt", "has 256 tokens but the context is 256 .* shorten it by 1"),
        ({"prompt": [5] * 250, "new": 7}, "max_tokens", "250 tokens and max_tokens 7 exceed .* 256 .* to 6 or less"),
        ({"prompt": [5, -1]}, "prompt", "token id -1"),
        ({"prompt": [5, 211]}, "prompt", "token id 211 is not below the vocabulary size 211"),
        ({"prompt": [5], "digest": "abc"}, "adapter", "without an adapter"),
    ],
)
async def test_requests_that_can_never_run_are_refused(
    engine: Engine, request_args: dict[str, Any], param: str, match: str
) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        await answer(engine, ask("x", **request_args))
    assert caught.value.param == param
    assert idle(engine)


async def test_a_request_larger_than_the_kv_cache_is_refused(model: TinyModel) -> None:
    async with running(settings_for(model, num_pages=10)) as engine:  # 40 tokens, and one that is never stored
        with pytest.raises(InvalidRequest, match=r"30 tokens.*max_tokens 12.*41 tokens.*10 pages.*num_pages") as caught:
            await answer(engine, ask("x", [5] * 30, new=12))
        assert (caught.value.param, caught.value.code) == ("max_tokens", CONTEXT_LENGTH_EXCEEDED)
        with pytest.raises(InvalidRequest, match="num_pages") as caught:
            await answer(engine, ask("x", [5] * 41, new=None))
        assert (caught.value.param, caught.value.code) == ("prompt", CONTEXT_LENGTH_EXCEEDED)
        assert (await answer(engine, ask("x", [5] * 30, new=11))).completion_tokens == 11
        unlimited = await answer(engine, ask("x", [5] * 30, new=None))
        assert (unlimited.completion_tokens, unlimited.finish_reason) == (11, "length")


async def test_a_full_queue_refuses_and_recovers(model: TinyModel) -> None:
    async with running(settings_for(model, max_rows=1, max_waiting=2)) as engine:
        tasks = [asyncio.create_task(answer(engine, ask(f"{i}", [5], new=100))) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded, match="3 requests are running or waiting"):
            await answer(engine, ask("one too many", [5]))
        await asyncio.gather(*tasks)
        assert (await answer(engine, ask("later", [5]))).completion_tokens == 8


async def test_a_request_id_in_use_is_refused(engine: Engine) -> None:
    stream = engine.generate(ask("same", [5], new=200))
    await anext(stream)
    with pytest.raises(InvalidRequest, match="'same' is in use"):
        await answer(engine, ask("same", [6]))
    assert engine.stats().running == 1
    await stream.aclose()


async def test_closing_ends_requests_with_a_clear_error(model: TinyModel) -> None:
    engine = Engine(settings_for(model))
    with pytest.raises(EngineDead, match=r"await start\(\) first"):
        await answer(engine, ask("x", [5]))
    assert not engine.healthy
    await engine.start()
    assert engine.healthy
    with pytest.raises(RuntimeError, match="started before"):
        await engine.start()
    task = asyncio.create_task(answer(engine, ask("x", [5], new=200)))
    await until(lambda: engine.stats().running == 1)
    await engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await task
    with pytest.raises(EngineDead, match="closed"):
        await answer(engine, ask("y", [5]))
    assert not engine.healthy
    await engine.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_start_that_is_given_up_leaves_no_engine_behind(model: TinyModel) -> None:
    engine = Engine(settings_for(model))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert engine._thread is not None
    await asyncio.to_thread(engine._thread.join, 30)
    assert not engine._thread.is_alive()
    assert not engine.healthy
    await engine.close()


async def test_a_start_that_is_given_up_as_it_ends_leaves_no_engine_behind(model: TinyModel) -> None:
    """The engine is up, and the event loop has not heard of it yet when its start is cancelled."""
    engine = Engine(settings_for(model))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    while not engine.healthy:  # keeps the event loop from hearing
        time.sleep(0.01)  # noqa: ASYNC251
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert engine._thread is not None
    assert not engine._thread.is_alive()
    assert not engine.healthy
    await engine.close()


async def test_a_broken_step_fails_every_request_and_says_so(model: TinyModel, adapter: TinyAdapter) -> None:
    async with running(settings_for(model, [adapter], max_rows=2)) as engine:
        tasks = [asyncio.create_task(answer(engine, ask(f"{i}", [5], adapter, new=200))) for i in range(4)]
        await until(lambda: engine.stats().running == 2)
        engine.parts.runner.model.embed = torch.empty(0, 64)  # as a device that lost its memory
        for task in tasks:
            with pytest.raises(EngineDead, match=r"the step loop broke.*replace this replica"):
                await task
        assert not engine.healthy
        assert not engine.stats().healthy
        depths = set()
        for _ in range(3):
            with pytest.raises(EngineDead, match="the step loop broke") as caught:
                await answer(engine, ask("later", [5]))
            depths.add(len(caught.traceback))
        assert len(depths) == 1, "each refusal keeps the frames of those before it"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"model": "/nowhere"}, "/nowhere/config.json does not exist"),
        ({"max_model_len": 512}, "max_model_len is 512 but .* knows 256 positions"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "device is 'cuda' but torch sees no GPU")]),
    ],
)
async def test_a_start_that_cannot_work_says_why(model: TinyModel, overrides: dict[str, Any], match: str) -> None:
    engine = Engine(replace(settings_for(model), **overrides))
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        await engine.start()
    assert not engine.healthy
    await engine.close()


async def test_an_engine_without_slots_serves_the_base_model_only(model: TinyModel) -> None:
    async with running(settings_for(model, slots={})) as engine:
        with pytest.raises(AdapterRefused, match="no adapter slots: set slots"):
            await answer(engine, ask("x", [5], "some"))
        assert_same(await answer(engine, ask("x", [5], logprobs=0)), expected(model, [5], None, 8))


async def test_random_weights_need_a_config_alone(model: TinyModel, tmp_path: Path) -> None:
    shutil.copy(model.path / "config.json", tmp_path)
    settings = EngineSettings(str(tmp_path), device="cpu", cpu_threads=1, load_random_weights=True, seed=3, num_pages=8)
    async with running(settings) as engine:
        got = await answer(engine, ask("x", [5], new=6, logprobs=1))
        assert (got.text, got.completion_tokens, got.logprobs[0].text) == ("", 6, "")
        with pytest.raises(InvalidRequest, match="use stop_token_ids"):
            await answer(engine, ask("x", [5], stop=("a",)))
        with pytest.raises(RuntimeError, match=r"no tokenizer\.json"):
            _ = engine.tokenizer


# --- adapters and news of them --------------------------------------------------------------------------------------


async def test_a_republished_adapter_never_serves_the_old_content(
    model: TinyModel, adapter: TinyAdapter, tmp_path: Path
) -> None:
    other = model.adapter("other", 8, seed=6)
    folder = tmp_path / "tenant"
    shutil.copytree(adapter.path, folder)
    tenant = TinyAdapter(folder, 8)
    async with running(settings_for(model, [tenant])) as engine:
        first = await answer(engine, ask("first", [5, 6], tenant, logprobs=0))
        (digest,) = engine.stats().resident
        for file in other.path.iterdir():
            shutil.copy(file, folder / file.name)
        second = await answer(engine, ask("second", [5, 6], tenant, logprobs=0))
        assert len(engine.stats().resident) == 2
        # Whoever resolved the old content gets it from host memory, or is told: never the new content.
        pinned = await answer(engine, ask("pinned", [5, 6], tenant, digest=digest, logprobs=0))
        with pytest.raises(AdapterChanged):
            await answer(engine, ask("never seen", [5, 6], tenant, digest="0" * 64))
    assert_same(first, expected(model, [5, 6], adapter, 8))
    assert_same(second, expected(model, [5, 6], other, 8))
    assert_same(pinned, expected(model, [5, 6], adapter, 8))


async def test_a_name_that_means_something_else_by_the_time_its_request_can_run_is_looked_up_again(
    model: TinyModel, adapter: TinyAdapter, tmp_path: Path
) -> None:
    """It waits for a row; its adapter leaves slot and host memory, and is published again."""
    other = model.adapter("other", 8, seed=6)
    folder = tmp_path / "tenant"
    shutil.copytree(adapter.path, folder)
    tenant = TinyAdapter(folder, 8)
    async with running(settings_for(model, [tenant], max_rows=1)) as engine:
        long = engine.generate(ask("long", [5], new=240))
        await anext(long)
        waiting = asyncio.create_task(answer(engine, ask("waiting", [5, 6], tenant, logprobs=0)))
        await until(lambda: engine.stats().prefetches == 1)
        (digest,) = engine.stats().resident
        for file in other.path.iterdir():
            shutil.copy(file, folder / file.name)
        store, slots = engine.parts.store, engine.parts.slots
        assert store is not None
        assert slots is not None
        store.host_cache.clear()

        def evict() -> None:
            assert slots.remove(digest)

        engine._started()._post(evict)  # on the engine's own thread
        await until(lambda: digest not in engine.stats().resident)
        await until(lambda: len(engine.stats().resident) == 1)
        await long.aclose()
        assert_same(await waiting, expected(model, [5, 6], other, 8))
        assert engine.stats().healthy


async def test_news_of_what_is_resident(model: TinyModel, adapter: TinyAdapter) -> None:
    other = model.adapter("other", 8, seed=6)
    news: list[Residency] = []

    def listen(residency: Residency) -> None:
        news.append(residency)
        raise RuntimeError("a listener's own fault")

    engine = Engine(replace(settings_for(model, [adapter, other]), slots={8: 1}), listen)
    await engine.start()
    assert engine.stats().residency_version == 0
    for tenant in (adapter, other, other):
        await answer(engine, ask("x", [5], tenant))
    stats = engine.stats()
    assert [list(residency.adapters) for residency in news][-1] == list(stats.resident)
    assert len(news) == stats.residency_version
    assert (stats.slot_hits, stats.slot_misses, stats.slot_evictions) == (1, 2, 1)
    await engine.close()

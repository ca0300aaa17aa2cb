"""Log probabilities of prompts and embeddings: right, and the same whoever shares the batch."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_store.errors import AdapterNotFound, AdapterRefused
from adapter_store.settings import StoreSettings
from engine import prompt_reading
from engine.engine import Engine
from engine.request import (
    EngineOverloaded,
    GenerationChunk,
    GenerationRequest,
    InvalidRequest,
    SamplingParams,
    TokenLogprob,
)
from engine.step_shapes import step_shapes
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, MLP, TinyAdapter, TinyModel

TOLERANCE = 2e-5
MakeModel = Callable[..., TinyModel]


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> TinyModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def adapters(model: TinyModel) -> list[TinyAdapter]:
    return [
        model.adapter("read-4", 4, ("q_proj", "v_proj"), seed=1),
        model.adapter("read-8", 8, ATTENTION + MLP, seed=2, use_rslora=True),
    ]


def embed(name: str, prompt: list[int], adapter: TinyAdapter | str | None = None, how: str = "mean"):  # type: ignore[no-untyped-def]
    return replace(ask(name, prompt, adapter), sampling=SamplingParams(), pooling=how)


def traffic(adapters: list[TinyAdapter], count: int = 18) -> list[GenerationRequest]:
    """In turn: log probabilities of the prompt, every second time with nothing else, its mean, its last hidden state,
    and a completion alone; over all adapters and the base model; prompts of 1 to 40 tokens."""
    rng = random.Random(3)
    made: list[GenerationRequest] = []
    for index in range(count):
        prompt = [rng.randrange(3, 211) for _ in range(rng.choice((1, 2, 9, 17, 40)))]
        adapter = (*adapters, None)[index % (len(adapters) + 1)]
        kind = (index // 3) % 4
        if kind in (1, 2):
            made.append(embed(f"r{index}", prompt, adapter, ("mean", "last")[kind - 1]))
        else:
            top, new = (None, 5) if kind else (index % 4, 5 * (index % 2))
            made.append(ask(f"r{index}", prompt, adapter, new=new, logprobs=0, prompt_logprobs=top))
    return made


def check(model: TinyModel, adapters: list[TinyAdapter], request: GenerationRequest, chunk: GenerationChunk) -> None:
    """What transformers and peft say with that adapter alone."""
    adapter = {adapter.name: adapter for adapter in adapters}.get(request.adapter or "")
    prompt, top = request.prompt_token_ids, request.sampling.prompt_logprobs
    assert (chunk.prompt_tokens, chunk.finish_reason is not None) == (len(prompt), True)
    if request.pooling is not None:
        states = model.hidden(prompt, adapter)
        want = states.mean(0) if request.pooling == "mean" else states[-1]
        assert chunk.embedding is not None
        assert (torch.tensor(chunk.embedding) - want).abs().max() <= TOLERANCE
        assert (chunk.text, chunk.token_ids, chunk.completion_tokens, chunk.finish_reason) == ("", (), 0, "stop")
        return
    if request.sampling.max_tokens == 0:
        assert (chunk.text, chunk.token_ids, chunk.completion_tokens, chunk.finish_reason) == ("", (), 0, "length")
    else:
        assert_same(chunk, expected(model, prompt, adapter, 5))
    assert chunk.embedding is None
    assert len(chunk.prompt_logprobs) == (0 if top is None else len(prompt))
    if top is None:
        return
    values = torch.log_softmax(model.logits(prompt, adapter), dim=-1)
    assert chunk.prompt_logprobs[0] is None
    for place, told in enumerate(chunk.prompt_logprobs[1:], 1):
        assert told is not None
        assert (told.token_id, told.text) == (prompt[place], f"t{prompt[place]}")
        assert abs(told.logprob - values[place - 1, told.token_id].item()) <= TOLERANCE
        likeliest = values[place - 1].topk(top or 0)
        assert [entry[0] for entry in told.top] == likeliest.indices.tolist()
        assert [entry[1] for entry in told.top] == pytest.approx(likeliest.values.tolist(), abs=TOLERANCE)
        assert [entry[2] for entry in told.top] == [f"t{token}" for token in likeliest.indices.tolist()]


def alike(got: GenerationChunk, want: GenerationChunk) -> None:
    """The same to rounding."""
    assert got.token_ids == want.token_ids
    assert (got.embedding is None) == (want.embedding is None)
    assert got.embedding is None or got.embedding == pytest.approx(want.embedding, abs=TOLERANCE)
    assert len(got.prompt_logprobs) == len(want.prompt_logprobs)
    for ours, theirs in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
        assert ours is not None and theirs is not None
        assert ours.logprob == pytest.approx(theirs.logprob, abs=TOLERANCE)


def at_rest(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.slots_in_use == 0 and stats.free_pages == stats.num_pages


@pytest.mark.parametrize("most_tokens", [512, 13])
async def test_law_1_a_mixed_batch_equals_transformers_and_peft(
    model: TinyModel, adapters: list[TinyAdapter], most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, and prompts in chunks; the LM head in pieces of five tokens."""
    monkeypatch.setattr(prompt_reading, "MOST_LOGITS", 5 * 211 + 7)
    requests = traffic(adapters, 24)
    async with running(settings_for(model, adapters, max_batch_tokens=most_tokens)) as engine:
        for request, chunk in zip(requests, await answers(engine, requests), strict=True):
            check(model, adapters, request, chunk)
        assert at_rest(engine)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
async def test_law_1_other_architectures(tiny_model: MakeModel, model_type: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=model_type == "qwen2")
    adapters = [model.adapter("read", 8, ATTENTION, seed=1)]
    requests = [
        request for request in traffic(adapters, 12) if request.pooling or request.sampling.prompt_logprobs is not None
    ]
    async with running(settings_for(model, adapters)) as engine:
        for request, chunk in zip(requests, await answers(engine, requests), strict=True):
            check(model, adapters, request, chunk)


async def test_law_2_neighbours_slots_eviction_chunks_and_preemption_change_nothing(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    requests = traffic(adapters)
    async with running(settings_for(model, adapters, max_batch_tokens=512)) as engine:
        alone = [await answer(engine, request) for request in requests]
    cramped = settings_for(model, adapters, max_batch_tokens=9, slots={16: 1}, num_pages=12, poison=True)
    async with running(cramped) as engine:
        for turn in range(5):  # each has both adapters, and there is one slot: an eviction at least
            order = requests[turn:] + requests[:turn]
            for request, chunk in zip(order, await answers(engine, order), strict=True):
                alike(chunk, alone[requests.index(request)])
        stats = engine.stats()
        assert at_rest(engine)
    assert stats.slot_evictions > 4


@pytest.mark.parametrize("how", ["mean", "last", "logprobs"])
async def test_law_2_a_prompt_that_is_preempted_is_read_again(model: TinyModel, how: str) -> None:
    """One token of it a step, while two completions grow until they need its pages."""
    prompt = list(range(40, 64))
    settings = settings_for(model, num_pages=14, max_mixed_tokens=1, max_batch_tokens=24)
    async with running(settings) as engine:
        rows = [engine.generate(ask(f"r{i}", [5 + i, 6, 7, 8], new=27)) for i in range(2)]
        for row in rows:
            await anext(row)
        read = embed("read", prompt, None, how)
        if how == "logprobs":
            read = ask("read", prompt, new=5, logprobs=0, prompt_logprobs=3)
        check(model, [], read, await answer(engine, read))
        assert engine.stats().preemptions > 0
        for row in rows:
            await row.aclose()


async def test_laws_hold_in_padded_steps(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    """Every step padded to one of the shapes that a GPU captures."""
    requests = traffic(adapters)
    settings = settings_for(model, adapters, max_batch_tokens=40, max_mixed_tokens=7, num_pages=24)
    async with running(settings) as engine:
        parts = engine.parts
        shapes = step_shapes(settings.max_rows, (8, 16, 40), settings.max_mixed_tokens)
        parts.runner.capture(shapes, -(-parts.max_model_len // settings.page_size))
        for request, chunk in zip(requests, await answers(engine, requests), strict=True):
            check(model, adapters, request, chunk)


async def test_a_prompt_that_is_cached_is_read_whole_all_the_same(model: TinyModel) -> None:
    prompt = list(range(3, 26))
    async with running(settings_for(model)) as engine:
        await answer(engine, ask("before", prompt, new=2))
        asked = [
            ask("logprobs", prompt, new=5, logprobs=0, prompt_logprobs=1),
            embed("mean", prompt),
            embed("last", prompt, None, "last"),
        ]
        for request, reused in zip(asked, (False, False, True), strict=True):
            before = engine.stats().reused_tokens
            check(model, [], request, await answer(engine, request))
            assert (engine.stats().reused_tokens > before) == reused
    async with running(settings_for(model)) as engine:
        await answer(engine, embed("first", prompt))
        check(model, [], *[request := ask("then", prompt, new=5, logprobs=0), await answer(engine, request)])
        assert engine.stats().reused_tokens == 20, "an embedding's pages serve others"


@pytest.mark.parametrize(
    "asked",
    [
        partial(embed, prompt=[7] * 64),
        partial(ask, prompt=[7] * 64, new=0, prompt_logprobs=1),
        partial(ask, prompt=[7] * 64, new=0, stop=("t7",), presence_penalty=1.0),
    ],
)
async def test_what_draws_nothing_has_the_whole_context_and_waits_its_turn(
    model: TinyModel, asked: Callable[[str], GenerationRequest]
) -> None:
    settings = settings_for(model, max_rows=2, max_waiting=0, max_model_len=64, num_pages=16)
    async with running(settings) as engine:
        check(model, [], asked("whole"), await answer(engine, asked("whole")))
        assert engine.stats().generated_tokens == 0
        assert engine.stats().prompt_tokens == 64
        running_rows = [engine.generate(ask(f"r{i}", [5, 6, 7], new=40)) for i in range(2)]
        for row in running_rows:
            await anext(row)
        with pytest.raises(EngineOverloaded):
            await answer(engine, asked("too many"))
        for row in running_rows:
            await row.aclose()


async def test_leaving_and_aborting_free_everything(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, max_batch_tokens=8, prefix_cache=False)) as engine:
        for turn in range(12):
            readers = [
                asyncio.create_task(answer(engine, embed(f"{turn}-{i}", [9] * 40, adapters[i % 2]))) for i in range(3)
            ]
            await asyncio.sleep(0.002 * turn)
            readers[0].cancel()
            engine.abort(f"{turn}-1")
            first, second, third = await asyncio.gather(*readers, return_exceptions=True)
            assert isinstance(first, (asyncio.CancelledError, GenerationChunk))
            assert isinstance(second, GenerationChunk)
            assert (second.finish_reason == "abort") == (second.embedding is None)
            assert isinstance(third, GenerationChunk)
            assert third.embedding is not None
        partly = await answer(engine, ask("plain", [9, 8, 7], new=5, logprobs=0))
        assert_same(partly, expected(model, [9, 8, 7], None, 5))
        assert at_rest(engine)


async def test_law_5_what_is_not_finite_is_refused_and_changes_nothing_for_others(
    model: TinyModel, adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    tensors = load_file(adapters[0].path / "adapter_model.safetensors")
    key = next(name for name in sorted(tensors) if "lora_B" in name)
    # Whatever order sums are taken in, products of these are infinite.
    for name in (key, key.replace("lora_B", "lora_A")):
        tensors[name] = torch.full_like(tensors[name], 1e38)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((adapters[0].path / "adapter_config.json").read_bytes())
    names = {"overflow": f"local:{tmp_path}", adapters[0].name: f"local:{adapters[0].path}"}
    store = StoreSettings(root=tmp_path, adapters=names)
    async with running(settings_for(model, store=store)) as engine:
        good = [embed("good", list(range(5, 30)), adapters[0]), ask("base", range(5, 9), new=5, logprobs=0)]

        async def refused(request: GenerationRequest, error: type[Exception], match: str) -> None:
            with pytest.raises(error, match=match):
                await answer(engine, request)

        chunks, *_ = await asyncio.gather(
            answers(engine, good),
            refused(embed("o1", [4, 5, 6], "overflow"), AdapterRefused, "hidden states are not finite"),
            refused(embed("o2", [4, 5, 6], "overflow", "last"), AdapterRefused, "not finite"),
            refused(ask("o3", [4, 5, 6], "overflow", prompt_logprobs=0), AdapterRefused, "not finite"),
            refused(ask("o4", [4, 5, 6], "overflow", new=0, prompt_logprobs=0), AdapterRefused, "not finite"),
            refused(embed("nobody", [4, 5, 6], "nobody"), AdapterNotFound, "nobody"),
        )
        for request, chunk in zip(good, chunks, strict=True):
            check(model, adapters, request, chunk)
        assert engine.healthy


async def test_what_cannot_run_is_refused_by_name(model: TinyModel) -> None:
    async with running(settings_for(model, max_model_len=32, num_pages=4, page_size=4)) as engine:
        for request, param, match in (
            (embed("a", [5], None, "max"), "pooling", "'max' but must be mean or last"),
            (embed("b", []), "prompt", "no tokens"),
            (embed("c", [5] * 33), "prompt", "33 tokens but the context is 32 tokens: shorten it by 1"),
            (embed("d", [5] * 17), "prompt", "16 tokens"),  # of all pages
            (embed("e", [999]), "prompt", "999"),
        ):
            with pytest.raises(InvalidRequest, match=match) as caught:
                await answer(engine, request)
            assert caught.value.param == param
        assert (await answer(engine, embed("f", [5] * 16))).embedding is not None
    for wrong in (21, -1, 1.5):
        with pytest.raises(InvalidRequest, match="between 0 and 20"):
            SamplingParams(prompt_logprobs=wrong)  # type: ignore[arg-type]


def test_what_was_read_crosses_processes_and_merges() -> None:
    told = TokenLogprob(7, -0.5, "t7", ((7, -0.5, "t7"), (8, -1.5, "t8")))
    first = GenerationChunk("r", "a", (9,), 2, 1, (told,), prompt_logprobs=(None, told))
    whole = first + GenerationChunk("r", "b", (10,), 2, 2, (told,), "length")
    assert whole.prompt_logprobs == (None, told)
    vector = GenerationChunk("r", "", (), 2, 0, finish_reason="stop", embedding=(0.25, -1.0))
    for chunk in (whole, vector):
        assert GenerationChunk.from_dict(json.loads(json.dumps(chunk.to_dict()))) == chunk
    asked = embed("r", [5, 6], "name", "last")
    assert GenerationRequest.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked

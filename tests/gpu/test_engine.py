"""The running engine on CUDA: the demo's texts, parity, memory sizing, adapters that come and go under poison."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_store.settings import StoreSettings
from engine.settings import EngineSettings
from examples.demo.words import ADAPTERS, held_out_prompts
from examples.demo.words import answer as demo_answer
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, MLP, TinyModel, build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def demo_settings(**overrides: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "model": str(ROOT / "examples/demo/model"),
        "model_name": "lorafleet-demo",
        "device": "cuda",
        "max_rows": 32,
        "max_batch_tokens": 256,
        "slots": {8: 2, 16: 2},
        "store": StoreSettings(root=ROOT, folders=("examples/demo/adapters",)),
    }
    return EngineSettings(**{**values, **overrides})


@pytest.mark.parametrize(
    "overrides",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "slots": {16: 1}, "num_pages": 40, "page_size": 4, "max_model_len": 80, "poison": True},
    ],
    ids=["fp32", "bf16", "bf16-cramped"],
)
async def test_every_tenant_gets_its_own_exact_text(overrides: dict[str, Any]) -> None:
    cases = [(prompt, style) for prompt in held_out_prompts(6) for style in ("base", *ADAPTERS)]
    async with running(demo_settings(**overrides)) as engine:
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
    assert stats.healthy
    assert stats.free_pages == stats.num_pages
    if "num_pages" in overrides:
        assert stats.slot_evictions >= 3
        assert stats.preemptions >= 1


async def test_fp32_equals_transformers_and_peft_whatever_the_batch(model: TinyModel) -> None:
    adapters = [
        model.adapter("r4", 4, ("q_proj", "v_proj", "o_proj"), seed=1),
        model.adapter("r8", 8, ATTENTION, seed=2),
        model.adapter("r16", 16, ATTENTION + MLP, seed=3),
    ]
    rng = random.Random(3)
    requests = [
        ask(f"{i}", [rng.randrange(3, 211) for _ in range(rng.choice((1, 5, 17, 40)))], choice, logprobs=0)
        for i, choice in enumerate([*adapters, None] * 3)
    ]
    by_name = {None: None, **{adapter.name: adapter for adapter in adapters}}
    roomy = settings_for(model, adapters, device="cuda", dtype="float32", num_pages=None)
    cramped = replace(roomy, slots=((16, 1),), num_pages=16, max_batch_tokens=11, poison=True)
    for limits in (roomy, cramped):
        async with running(limits) as engine:
            for request, chunk in zip(requests, await answers(engine, requests), strict=True):
                assert_same(chunk, expected(model, request.prompt_token_ids, by_name[request.adapter], 8))


async def test_seeded_draws_do_not_depend_on_the_batch(model: TinyModel) -> None:
    adapter = model.adapter("drawn", 8, seed=9)
    requests = [
        ask(f"{i}", [5, 6 + i], (None, adapter)[i % 2], new=16, temperature=1.2, top_p=0.95, seed=i) for i in range(8)
    ]
    async with running(settings_for(model, [adapter], device="cuda", dtype="float32")) as engine:
        together = [chunk.token_ids for chunk in await answers(engine, requests)]
        alone = [(await answer(engine, request)).token_ids for request in requests]
    async with running(settings_for(model, [adapter], device="cpu")) as engine:
        on_cpu = [chunk.token_ids for chunk in await answers(engine, requests)]
    assert together == alone == on_cpu


@pytest.mark.parametrize("fraction", [0.9, 1e-5])
async def test_the_kv_cache_is_sized_from_free_memory(fraction: float) -> None:
    settings = demo_settings(kv_memory_fraction=fraction)
    free, _ = torch.cuda.mem_get_info()
    async with running(settings) as engine:
        stats = engine.stats()
        every_row = settings.max_rows * 512 // settings.page_size
        kv = engine.parts.runner.kv
        used = sum(tensor.nbytes for tensor in (*kv.keys, *kv.values))
        assert used <= free * fraction
        assert stats.num_pages == every_row if fraction == 0.9 else 1 <= stats.num_pages < every_row
        (tokens,) = [engine.tokenizer.encode("robot, old, eats, school")]
        got = await answer(engine, ask("x", tokens, new=12, ignore_eos=False))
    assert got.text == "The old robot eats in the school."

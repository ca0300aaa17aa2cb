"""Rows with changed logits on CUDA, in captured steps: formulas, neighbours, preemption, schemas."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from engine.request import Grammar, SamplingParams
from engine.settings import EngineSettings
from tests.engine.changes import DEMO, PERSON, changed, greedy_with, penalised_requests, say
from tests.engine.engines import answer, answers, running, settings_for
from tests.engine.json_schemas import random_schema
from tests.engine.oracle import TinyModel, build_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def demo_settings(**overrides: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "model": str(DEMO),
        "device": "cuda",
        "dtype": "float32",
        "max_rows": 16,
        "max_batch_tokens": 128,
        "slots": {},
        "num_pages": 512,
        "poison": True,
    }
    return EngineSettings(**{**values, **overrides})


@pytest.mark.parametrize("cuda_graphs", [True, False])
async def test_penalties_and_biases_equal_their_formulas(model: TinyModel, cuda_graphs: bool) -> None:
    requests = penalised_requests()
    settings = settings_for(model, device="cuda", dtype="float32", poison=True, cuda_graphs=cuda_graphs)
    async with running(settings) as engine:
        assert (engine.parts.runner.graphs is not None) == cuda_graphs
        for turn in range(2):
            got = await answers(engine, [replace(one, request_id=f"{one.request_id}-{turn}") for one in requests])
            for request, chunk in zip(requests, got, strict=True):
                assert chunk.token_ids == greedy_with(model, request, request.sampling), request.sampling
    assert got[0].token_ids != greedy_with(model, requests[0], SamplingParams())


async def test_rows_draw_the_same_beside_changed_ones_and_when_preempted() -> None:
    async with running(demo_settings()) as engine:
        plain = [say(engine, f"p{seed}", seed=seed, temperature=1.2, top_p=0.95) for seed in range(4)]
        kinds = changed(temperature=1.0, max_tokens=40)
        others = [say(engine, f"c{seed}", seed=seed, **kind) for seed, kind in enumerate(kinds)]
        others.append(say(engine, "g", grammar=Grammar("json_schema", PERSON), seed=6, max_tokens=120))
        requests = [*plain, *others]
        alone = [(await answer(engine, request)).token_ids for request in requests]
        together = [chunk.token_ids for chunk in await answers(engine, requests[::-1])][::-1]
    async with running(demo_settings(num_pages=9, max_model_len=140, page_size=16)) as engine:
        cramped = [chunk.token_ids for chunk in await answers(engine, requests)]
        assert engine.stats().preemptions > 2
    assert alone == together == cramped


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_output_of_a_random_schema_validates(dtype: str) -> None:
    schemas = [random_schema(seed) for seed in range(40)]
    async with running(demo_settings(dtype=dtype, max_rows=40)) as engine:
        requests = [
            say(engine, f"{seed}", grammar=Grammar("json_schema", json.dumps(schema)), seed=seed, max_tokens=490)
            for seed, schema in enumerate(schemas)
        ]
        got = await answers(engine, requests)
    for schema, chunk in zip(schemas, got, strict=True):
        assert chunk.finish_reason == "stop", (schema, chunk.text)
        jsonschema.validate(json.loads(chunk.text), schema)

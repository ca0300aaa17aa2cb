"""Penalties, biases, min_tokens and grammars on the running engine, alone and beside rows that ask for none of it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.engine import Engine
from engine.grammar import GrammarState
from engine.request import GenerationChunk, GenerationRequest, Grammar, InvalidRequest, SamplingParams
from engine.scheduler import Scheduler, StepPlan
from engine.settings import EngineSettings
from engine.step_shapes import step_shapes
from tests.engine.changes import DEMO, PERSON, changed, greedy_with, penalised_requests, say
from tests.engine.engines import answer, answers, ask, running, settings_for
from tests.engine.json_schemas import random_schema
from tests.engine.oracle import TinyModel, build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def demo_settings(**overrides: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "model": str(DEMO),
        "device": "cpu",
        "cpu_threads": 1,
        "num_pages": 512,
        "max_rows": 16,
        "slots": {},
        "poison": True,
    }
    return EngineSettings(**{**values, **overrides})


@pytest.fixture
async def demo() -> AsyncIterator[Engine]:
    async with running(demo_settings()) as engine:
        yield engine


def capture(engine: Engine, settings: EngineSettings) -> None:
    """Have every step padded to one of the shapes that a GPU captures."""
    shapes = step_shapes(settings.max_rows, (8, settings.max_batch_tokens), settings.max_mixed_tokens)
    engine.parts.runner.capture(shapes, -(-engine.parts.max_model_len // settings.page_size))


@pytest.mark.parametrize("padded", [False, True])
async def test_penalties_and_biases_equal_their_formulas(model: TinyModel, padded: bool) -> None:
    settings = settings_for(model, poison=True)
    requests = penalised_requests()
    async with running(settings) as engine:
        if padded:
            capture(engine, settings)
        got = await answers(engine, requests)
        again = await answers(engine, [replace(request, request_id=f"x{request.request_id}") for request in requests])
    for request, chunk, other in zip(requests, got, again, strict=True):
        assert chunk.token_ids == greedy_with(model, request, request.sampling), request.sampling
        assert other.token_ids == chunk.token_ids, "a place's last owner was seen"
    plain = [greedy_with(model, request, SamplingParams()) for request in requests]
    assert [chunk.token_ids != want for chunk, want in zip(got, plain, strict=True)] == [True] * 4 + [False]


@pytest.mark.parametrize("padded", [False, True])
async def test_plain_rows_draw_the_same_beside_changed_ones(padded: bool) -> None:
    settings = demo_settings(max_rows=8, max_batch_tokens=64)
    async with running(settings) as engine:
        if padded:
            capture(engine, settings)
        plain = [say(engine, f"p{seed}", seed=seed, temperature=1.2, top_p=0.95, logprobs=1) for seed in range(3)]
        alone = await answers(engine, plain)
        others = [say(engine, f"c{n}", **kind) for n, kind in enumerate(changed(temperature=1.0, seed=5))]
        others.append(say(engine, "g", grammar=Grammar("json_schema", PERSON), temperature=1.0, seed=6))
        beside = await answers(engine, [*others, *plain])
        again = await answers(engine, [*plain, *others[::-1]])
    for one, two, three in zip(alone, beside[len(others) :], again, strict=False):
        assert one.token_ids == two.token_ids == three.token_ids
        assert one.text == two.text
        for entry, other in zip(one.logprobs, two.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=2e-5)
    seeded = {chunk.request_id: chunk.token_ids for chunk in beside}
    for chunk in again:
        assert chunk.token_ids == seeded[chunk.request_id]


async def test_a_preempted_row_goes_on_as_if_it_had_not_been(demo: Engine) -> None:
    kinds = [*changed(temperature=1.0, max_tokens=40), {"grammar": Grammar("json_schema", PERSON), "max_tokens": 120}]
    requests = [say(demo, str(n), seed=n, **kind) for n, kind in enumerate(kinds)]
    alone = [await answer(demo, request) for request in requests]
    async with running(demo_settings(num_pages=9, max_model_len=140, max_rows=6, page_size=16)) as engine:
        cramped = await answers(engine, requests)
        assert engine.stats().preemptions > 2
    assert [chunk.token_ids for chunk in cramped] == [chunk.token_ids for chunk in alone]
    assert [chunk.text for chunk in cramped] == [chunk.text for chunk in alone]


async def test_no_end_before_min_tokens(demo: Engine) -> None:
    eos = next(iter(demo.parts.eos_token_ids))
    ending = {"logit_bias": ((eos, 100.0),), "temperature": 0.0}
    first, held, stopped, ignored = await answers(
        demo,
        [
            say(demo, "a", **ending),
            say(demo, "b", **ending, min_tokens=5),
            say(demo, "c", logit_bias=((70, 100.0),), temperature=0.0, min_tokens=3, stop_token_ids=(70, 2**70)),
            say(demo, "d", **ending, min_tokens=5, ignore_eos=True),
        ],
    )
    assert (first.completion_tokens, first.finish_reason) == (1, "stop")
    assert (held.completion_tokens, held.finish_reason) == (6, "stop")
    assert eos not in held.token_ids[:-1]
    assert (stopped.completion_tokens, stopped.stop_reason) == (4, 70)
    assert set(ignored.token_ids) == {eos}


async def test_every_output_of_a_random_schema_validates(demo: Engine) -> None:
    schemas = [random_schema(seed) for seed in range(40)]
    requests = [
        say(demo, f"s{seed}", grammar=Grammar("json_schema", json.dumps(schema)), seed=seed, max_tokens=490)
        for seed, schema in enumerate(schemas)
    ]
    crowd = asyncio.Semaphore(16)

    async def one(request: GenerationRequest) -> GenerationChunk:
        async with crowd:
            return await answer(demo, request)

    for schema, chunk in zip(schemas, await asyncio.gather(*map(one, requests)), strict=True):
        assert chunk.finish_reason == "stop", (schema, chunk.text)
        jsonschema.validate(json.loads(chunk.text), schema)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "(yes|no), [0-9]{3}!"), "(yes|no), [0-9]{3}!"),
        (Grammar("choice", '["left", "right"]'), "left|right"),
        (Grammar("lark", 'start: "<" /[a-c]{1,20}/ ">"'), "<[a-c]{1,20}>"),
    ],
)
async def test_other_grammars(demo: Engine, grammar: Grammar, pattern: str) -> None:
    for seed in range(4):
        chunk = await answer(demo, say(demo, "one", grammar=grammar, seed=seed, max_tokens=400))
        assert re.fullmatch(pattern, chunk.text)
        assert chunk.finish_reason == "stop"
        assert chunk.stop_reason is None


async def test_a_grammar_ends_at_max_tokens_and_stop_strings_as_well(demo: Engine) -> None:
    letters = Grammar("regex", "[a-z]{200}")
    short, cut, least = await answers(
        demo,
        [
            say(demo, "a", grammar=letters, max_tokens=5),
            say(demo, "b", grammar=Grammar("regex", "abc[x-z]{30}"), stop=("bc",), max_tokens=50),
            say(demo, "c", grammar=Grammar("regex", "a{0,50}"), min_tokens=12, max_tokens=60),
        ],
    )
    assert (short.completion_tokens, short.finish_reason) == (5, "length")
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("a", "stop", "bc")
    assert least.completion_tokens >= 12
    assert least.finish_reason == "stop"


async def test_json_objects_with_penalties_and_n_seeds(demo: Engine) -> None:
    requests = [
        say(
            demo,
            f"{seed}",
            grammar=Grammar("json_object"),
            seed=seed,
            max_tokens=490,
            temperature=1.5,
            frequency_penalty=1.0,
        )
        for seed in range(3)
    ]
    chunks = await answers(demo, requests)
    ended = [chunk for chunk in chunks if chunk.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(chunk.text), dict) for chunk in ended)
    assert len({chunk.token_ids for chunk in chunks}) == len(chunks)


async def test_one_request_s_bad_grammar_is_its_own(demo: Engine) -> None:
    good = asyncio.create_task(answer(demo, say(demo, "good", seed=1, max_tokens=20)))
    bad = [
        ({"grammar": Grammar("regex", "[a-")}, "unclosed character class"),
        ({"grammar": Grammar("json_schema", '{"type": "strng"}')}, "Invalid type: strng"),
        ({"logit_bias": ((512, 1.0),)}, "token id 512, which is not below the vocabulary size 512"),
    ]
    for sampling, reason in bad:
        with pytest.raises(InvalidRequest, match=reason):
            await answer(demo, say(demo, "bad", **sampling))
    assert (await good).completion_tokens > 0


async def test_a_grammar_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    settings = demo_settings(model=str(tmp_path), load_random_weights=True, max_model_len=64)
    async with running(settings) as engine:
        with pytest.raises(InvalidRequest, match="needs a tokenizer"):
            await answer(engine, ask("a", [5, 6], grammar=Grammar("json_object")))
        assert (await answer(engine, ask("b", [5, 6], new=3, presence_penalty=1.0))).completion_tokens == 3


async def test_free_rows_run_in_every_step_and_structured_ones_in_every_other(demo: Engine) -> None:
    before = demo.stats().steps
    free = asyncio.create_task(answer(demo, say(demo, "free", seed=1, ignore_eos=True, max_tokens=60)))
    structured = [
        say(demo, f"s{n}", grammar=Grammar("regex", "[a-z]{300}"), seed=n, max_tokens=12, top_k=50) for n in range(4)
    ]
    assert all(chunk.completion_tokens == 12 for chunk in await answers(demo, structured))
    assert (await free).completion_tokens == 60
    assert demo.stats().steps - before <= 64


async def test_a_grammar_that_takes_its_time_holds_up_nobody(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask takes longer than the step loop waits; the row's text is the same, and it ends when it is aborted."""
    letters = Grammar("regex", "[a-z]{12}")
    quick = await answer(demo, say(demo, "quick", grammar=letters, seed=3, max_tokens=40))
    go, look_ahead = threading.Event(), GrammarState.look_ahead

    def slow(self: GrammarState, mask: np.ndarray) -> None:
        go.wait(20)
        time.sleep(0.004)
        look_ahead(self, mask)

    monkeypatch.setattr(GrammarState, "look_ahead", slow)
    held = asyncio.create_task(answer(demo, say(demo, "held", grammar=letters, seed=3, max_tokens=40)))
    left = asyncio.create_task(answer(demo, say(demo, "left", grammar=letters, seed=4, max_tokens=40)))
    free = await answer(demo, say(demo, "free", seed=1, ignore_eos=True, max_tokens=60))
    assert free.completion_tokens == 60
    assert not held.done()
    demo.abort("left")
    assert (await left).finish_reason == "abort"
    go.set()
    assert (await held).token_ids == quick.token_ids
    assert demo.stats().running == 0


@pytest.mark.parametrize("meanwhile", [False, True])
async def test_rows_whose_masks_are_late_are_preempted_and_come_back(
    monkeypatch: pytest.MonkeyPatch, *, meanwhile: bool
) -> None:
    """meanwhile: masks for which a step found nothing to do are there as soon as that is found."""
    look_ahead, plan_step = GrammarState.look_ahead, Scheduler.plan

    def slow(self: GrammarState, mask: np.ndarray) -> None:
        time.sleep(0.01)
        look_ahead(self, mask)

    def planned(self: Scheduler) -> StepPlan:
        plan = plan_step(self)
        if not plan.rows and meanwhile:
            time.sleep(0.015)
        return plan

    async with running(
        demo_settings(num_pages=6 if meanwhile else 9, max_model_len=60 if meanwhile else 140, max_rows=6, page_size=16)
    ) as engine:
        digits = Grammar("regex", "([a-f][0-9]){12}")  # no two masks in turn are alike
        requests = [say(engine, f"{seed}", grammar=digits, seed=seed, max_tokens=30) for seed in range(4)]
        alone = [(await answer(engine, request)).token_ids for request in requests]
        monkeypatch.setattr(Scheduler, "plan", planned)
        monkeypatch.setattr(GrammarState, "look_ahead", slow)
        if not meanwhile:
            requests.append(say(engine, "free", seed=9, ignore_eos=True, max_tokens=110))
        cramped = [chunk.token_ids for chunk in await answers(engine, requests)]
        assert engine.stats().preemptions > 0
    assert cramped[:4] == alone

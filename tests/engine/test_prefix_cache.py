"""A common beginning is computed once for each adapter, and never taken for another's."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefix_keys import extend_keys
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, TinyAdapter, TinyModel, build_tiny_model
from tests.engine.served import prompt

SYSTEM = prompt(19, seed=5)  # four pages of four tokens, and a bit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(model: TinyModel) -> list[TinyAdapter]:
    return [model.adapter(f"tenant-{seed}", 8, ATTENTION, seed=seed) for seed in range(2)]


def keys(tokens: list[int], digest: str | None = None, pages: int = 2) -> list[bytes]:
    made: list[bytes] = []
    extend_keys(made, digest, tokens, pages, 4)
    return made


@given(st.lists(st.integers(0, 10**6), min_size=8, max_size=8), st.integers(0, 7), st.integers(0, 10**6))
def test_a_key_names_adapter_and_every_token_before(tokens: list[int], place: int, token: int) -> None:
    same = keys(tokens)
    assert keys(list(tokens)) == same
    assert not set(keys(tokens, "a")) & (set(same) | set(keys(tokens, "b")))
    other = [*tokens[:place], token, *tokens[place + 1 :]]
    if other != tokens:
        assert keys(other)[place // 4 :] != same[place // 4 :]
        assert keys(other)[-1] != same[-1], "a change anywhere before changes the last"
        assert keys(other)[: place // 4] == same[: place // 4]
    one: list[bytes] = []
    extend_keys(one, None, tokens, 1, 4)
    extend_keys(one, None, tokens, 2, 4)
    assert one == same, "keys may be made page by page"


async def test_a_system_prompt_is_computed_once_for_each_tenant(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters)) as engine:
        reused = [0]
        for adapter in (None, *adapters):
            for question in ((7, 8, 9, 10), (9, 10, 11), (7, 8, 9, 10)):
                got = await answer(
                    engine, ask(f"{adapter}-{len(reused)}", [*SYSTEM, *question], adapter, new=6, logprobs=0)
                )
                assert_same(got, expected(model, [*SYSTEM, *question], adapter, 6))
                reused.append(engine.stats().reused_tokens)
        steps = [after - before for before, after in pairwise(reused)]
        # The first of a tenant finds nothing. What follows SYSTEM begins in its fifth page, which the third finds full.
        assert steps == [0, 16, 20] * 3
        assert engine.stats().free_pages == engine.stats().num_pages


async def test_requests_of_one_step_and_of_the_next_share_what_is_there(model: TinyModel) -> None:
    questions = [[*SYSTEM, number, number + 1] for number in range(3, 9)]
    async with running(settings_for(model, max_rows=3)) as engine:
        got = await answers(engine, [ask(f"{i}", tokens, new=5, logprobs=0) for i, tokens in enumerate(questions)])
        stats = engine.stats()
    for tokens, chunk in zip(questions, got, strict=True):
        assert_same(chunk, expected(model, tokens, None, 5))
    assert stats.reused_tokens >= 3 * 16
    assert stats.free_pages == stats.num_pages


async def test_a_republished_adapter_finds_nothing_of_the_old_one(model: TinyModel) -> None:
    old, new = (model.adapter(f"version-{seed}", 8, ATTENTION, seed=20 + seed) for seed in range(2))
    async with running(settings_for(model, [old, new])) as engine:
        for adapter in (old, new):
            got = await answer(engine, ask(adapter.name, [*SYSTEM, 7], adapter, new=4, logprobs=0))
            assert_same(got, expected(model, [*SYSTEM, 7], adapter, 4))
        assert engine.stats().reused_tokens == 0


async def test_without_the_cache_nothing_is_reused(model: TinyModel) -> None:
    async with running(settings_for(model, prefix_cache=False)) as engine:
        first = await answer(engine, ask("a", [*SYSTEM, 7], new=4))
        second = await answer(engine, ask("b", [*SYSTEM, 7], new=4))
        assert engine.stats().reused_tokens == 0
    assert first.token_ids == second.token_ids


async def test_a_preempted_row_finds_its_own_pages_again(model: TinyModel) -> None:
    prompts = [prompt(9, seed=number) for number in range(2)]
    async with running(settings_for(model, num_pages=9, page_size=4, max_model_len=32)) as engine:
        got = await answers(engine, [ask(f"{i}", tokens, new=16, logprobs=0) for i, tokens in enumerate(prompts)])
        stats = engine.stats()
    assert stats.preemptions >= 1
    for tokens, chunk in zip(prompts, got, strict=True):
        assert_same(chunk, expected(model, tokens, None, 16))

"""Steps are launched before the ones before them are read, and nothing that a request sees depends on it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.flight import Flight
from engine.request import SamplingParams
from engine.runner import Runner
from engine.sequence import PENDING, Sequence
from tests.engine.engines import answer, answers, ask, expected, running, settings_for
from tests.engine.oracle import TinyModel, build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """launch and read, in the order in which the engine does them."""
    events: list[str] = []
    launch, read = Runner.launch, Flight.read

    def launched(self: Runner, *arguments: Any, **options: Any) -> Flight:
        events.append("launch")
        return launch(self, *arguments, **options)

    def was_read(self: Flight) -> Any:
        events.append("read")
        return read(self)

    monkeypatch.setattr(Runner, "launch", launched)
    monkeypatch.setattr(Flight, "read", was_read)
    return events


async def test_a_step_is_launched_before_the_one_before_it_is_read(model: TinyModel, log: list[str]) -> None:
    async with running(settings_for(model)) as engine:
        log.clear()
        chunk = await answer(engine, ask("a", range(3, 9), new=5))
    assert len(chunk.token_ids) == 5
    # The prompt draws the first token; after the fifth nothing is left to launch.
    assert log == ["launch", "launch", "read", "launch", "read", "launch", "read", "launch", "read", "read"]


async def test_what_is_drawn_after_the_end_is_dropped(model: TinyModel, log: list[str]) -> None:
    """A stop token is seen one step late: the row goes through one step more, which nobody sees."""
    async with running(settings_for(model)) as engine:
        whole = await answer(engine, ask("a", range(3, 9), new=8))
        stop = next(
            token
            for number, token in enumerate(whole.token_ids)
            if number >= 2 and token not in whole.token_ids[:number]
        )
        log.clear()
        cut = await answer(engine, ask("b", range(3, 9), new=8, stop_token_ids=(stop,)))
        steps = log.count("launch")
        beside = await answers(
            engine,
            [
                ask("c", range(3, 9), new=8, stop_token_ids=(stop,)),
                ask("d", range(5, 11), new=8),
                ask("e", range(3, 9), new=8),
            ],
        )
        stats = engine.stats()
    until = whole.token_ids[: whole.token_ids.index(stop) + 1]
    assert (cut.token_ids, cut.finish_reason, cut.completion_tokens) == (until, "stop", len(until))
    assert steps == len(until) + 1
    assert [chunk.token_ids for chunk in beside] == [
        until,
        expected(model, range(5, 11), None, 8).tokens,
        whole.token_ids,
    ]
    assert stats.free_pages == stats.num_pages
    assert stats.generated_tokens == 8 + len(until) * 2 + 16


async def test_a_row_preempted_while_its_token_is_under_way_goes_on_with_it(model: TinyModel) -> None:
    """Pages for two rows, then not for both: the newer is preempted between launch and read, and computed again."""
    async with running(settings_for(model, num_pages=9, page_size=2, max_model_len=18)) as engine:
        got = await answers(engine, [ask("a", range(3, 9), new=10), ask("b", range(5, 11), new=10)])
        stats = engine.stats()
    assert stats.preemptions >= 1
    assert [chunk.token_ids for chunk in got] == [
        expected(model, range(first, first + 6), None, 10).tokens for first in (3, 5)
    ]


def test_a_sequence_between_launch_and_read() -> None:
    from engine.request import GenerationRequest

    sequence = Sequence(GenerationRequest("a", (7, 8, 9), SamplingParams()), 0, 6, seed=0)
    sequence.launched(3, 4)
    assert (sequence.tokens, sequence.awaited, sequence.decoding, sequence.completion_tokens) == (
        [7, 8, 9, PENDING],
        4,
        True,
        0,
    )
    sequence.launched(4, 2)
    sequence.read(50)
    assert (sequence.tokens, sequence.awaited, sequence.completion_tokens) == ([7, 8, 9, 50, PENDING], 2, 1)
    sequence.read(51)
    assert (sequence.tokens, sequence.awaited, sequence.full) == ([7, 8, 9, 50, 51], -1, False)
    sequence.launched(5, 0)
    assert sequence.full

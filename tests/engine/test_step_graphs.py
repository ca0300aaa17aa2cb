"""Decode steps on fixed, padded buffers, captured as CUDA graphs on a GPU, against the same steps run one by one."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace

import pytest
import torch

from adapter_store.slots import Slot
from engine.changed_rows import ChangedRows
from engine.flight import SampledToken
from engine.prompt_reading import reading_for
from engine.request import GenerationRequest, SamplingParams
from engine.runner import Runner
from engine.scheduler import PlannedRow, StepPlan
from engine.sequence import Sequence
from engine.step_shapes import StepShape, prefill_buckets, row_buckets, step_shapes
from tests.engine.oracle import TinyAdapter, TinyModel, build_tiny_model
from tests.engine.served import Served, prompt, serve

PAGE, PAGES, MOST_PAGES = 4, 64, 9
GREEDY = SamplingParams(temperature=0.0, logprobs=2)
DRAWN = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, logprobs=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def served(request: pytest.FixtureRequest, tiny: TinyModel) -> Served:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return serve(tiny, device=request.param)


class Rows:
    """Sequences on one runner whose KV cache is NaN until written, decoded with or without graphs."""

    def __init__(self, served: Served, buckets: Many[int] | None, mixed: Many[StepShape] = ()) -> None:
        self.served = served
        changed = ChangedRows(8, served.model.spec.vocab_size, served.model.device)
        self.runner = Runner(served.model, served.model.new_kv_cache(PAGES, PAGE), served.pool, 32, changed)
        self.runner.poison(range(PAGES))
        if buckets is not None:
            shapes = [StepShape(rows, 0, 0) for rows in buckets]
            self.runner.capture([*shapes, *mixed], MOST_PAGES)
            self.runner.poison(range(PAGES))  # what padded rows wrote, had they written anything
        self.free = list(range(PAGES))

    def sequence(self, number: int, length: int, adapter: TinyAdapter | None, sampling: SamplingParams) -> Sequence:
        """A sequence of which nothing is computed."""
        tokens = tuple(prompt(length, seed=number))
        request = GenerationRequest(f"{number}", tokens, sampling)
        sequence = Sequence(request, number, length + 99, seed=1000 + number)
        index = self.served.slot(adapter)
        sequence.slot = None if index < 0 else Slot(index, 16, 0, 0)
        self.grow(sequence)
        return sequence

    def add(self, number: int, length: int, adapter: TinyAdapter | None, sampling: SamplingParams) -> Sequence:
        """A sequence with its prompt in the cache."""
        sequence = self.sequence(number, length, adapter, sampling)
        (first,) = self.runner.launch(StepPlan((PlannedRow(sequence, 0, length, samples=True),), 0)).read()
        self.take(sequence, first)
        return sequence

    def grow(self, sequence: Sequence) -> None:
        while len(sequence.pages) * PAGE < len(sequence.tokens):
            sequence.pages.append(self.free.pop((7 * len(self.free)) // 11))

    def take(self, sequence: Sequence, sampled: SampledToken) -> None:
        assert sampled.token_id is not None
        sequence.read(sampled.token_id)

    def decode(self, sequences: Many[Sequence]) -> list[SampledToken]:
        return self.step(sequences, ())

    def step(self, sequences: Many[Sequence], chunks: Many[tuple[Sequence, int]]) -> list[SampledToken]:
        """A token of each of ``sequences``, and for (sequence, end) its prompt up to ``end``."""
        for sequence in (*sequences, *(one for one, _ in chunks)):
            self.grow(sequence)
        rows = [PlannedRow(one, one.computed, len(one.tokens), samples=True) for one in sequences]
        rows.sort(key=lambda row: row.sequence.lora_index, reverse=True)
        prompts = [PlannedRow(one, one.computed, end, samples=end == len(one.tokens)) for one, end in chunks]
        flight = self.runner.launch(StepPlan((*rows, *prompts), len(rows)))
        drawn = flight.read()
        for row, sampled in zip(flight.rows, drawn, strict=True):
            self.take(row.sequence, sampled)
        return drawn


def mixed(rows: Rows, count: int) -> list[Sequence]:
    choices = [None, *rows.served.adapters]
    return [
        rows.add(number, 3 + 2 * number, choices[number % len(choices)], (GREEDY, DRAWN)[number % 2])
        for number in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_captured_steps_draw_what_the_others_draw(served: Served, count: int) -> None:
    plain, captured = Rows(served, None), Rows(served, [1, 4, 7])
    expected, got = mixed(plain, count), mixed(captured, count)
    for _ in range(5):
        for want, have in zip(plain.decode(expected), captured.decode(got), strict=True):
            assert want.token_id == have.token_id
            assert want.logprob == pytest.approx(have.logprob, abs=2e-5)
            assert [token for token, _ in want.top] == [token for token, _ in have.top]
    assert [one.tokens for one in got] == [one.tokens for one in expected]


@pytest.mark.parametrize("captured", [False, True])
def test_reading_a_prompt_changes_no_bit_of_what_the_step_draws(served: Served, captured: bool) -> None:
    def draws(prompt_logprobs: int | None) -> list[SampledToken]:
        rows = Rows(served, [4], [StepShape(4, 8, 32)]) if captured else Rows(served, None)
        decoding = mixed(rows, 2)
        asks = rows.sequence(7, 12, served.adapters[0], replace(DRAWN, prompt_logprobs=prompt_logprobs))
        beside = rows.sequence(8, 9, served.adapters[1], GREEDY)
        asks.reading = reading_for(asks.request)
        drawn = [*rows.step(decoding, [(asks, 7), (beside, 9)]), *rows.step(decoding, [(asks, 12)])]
        assert (asks.reading is not None and asks.reading.land()) == (prompt_logprobs is not None)
        return drawn

    assert draws(3) == draws(None)


def test_lora_is_launched_for_none_for_few_or_for_all_rows(served: Served) -> None:
    rows = Rows(served, [2, 16])
    base = [rows.add(number, 5, None, GREEDY) for number in range(2)]
    calls: list[tuple[int, int]] = []
    forward = served.model.forward

    def watched(inputs, *arguments, **options):  # type: ignore[no-untyped-def]
        calls.append((inputs.num_decode_rows, inputs.num_lora_rows))
        return forward(inputs, *arguments, **options)

    served.model.forward = watched  # type: ignore[method-assign]
    try:
        rows.decode(base)
        few = [rows.add(7, 4, served.adapters[0], GREEDY)]
        rows.decode([*base, *few])
        many = [rows.add(number, 4, served.adapters[1], GREEDY) for number in range(8, 16)]
        rows.decode([*base, *few, *many])
    finally:
        served.model.forward = forward  # type: ignore[method-assign]
    prefills = [(0, 0)] * 9
    if served.model.device.type == "cuda":  # graphs are replayed
        assert calls == prefills
    else:
        assert calls == [(2, 0), (0, 0), (16, 8), *prefills[1:], (16, 16)]


def test_a_rows_bits_are_the_same_in_every_step_of_a_bucket(served: Served) -> None:
    """Alone, or among rows of the base model and of other adapters, on other pages."""
    results = []
    for company in (0, 2, 5):
        rows = Rows(served, [6])
        others = mixed(rows, company)
        own = rows.add(50, 9, served.adapters[1], DRAWN)
        own_results = []
        for _ in range(4):
            drawn = rows.decode([*others, own])
            order = sorted([*others, own], key=lambda one: one.lora_index, reverse=True)
            own_results.append(drawn[order.index(own)])
        results.append(own_results)
    assert results[0] == results[1] == results[2]


def test_an_adapter_that_moves_to_another_slot_is_read_there(served: Served) -> None:
    rows, moved = Rows(served, [4]), Rows(served, [4])
    stay = [rows.add(number, 6, served.adapters[number], GREEDY) for number in range(3)]
    go = [moved.add(number, 6, served.adapters[number], GREEDY) for number in range(3)]
    rows.decode(stay)
    moved.decode(go)
    expected = rows.decode(stay)
    served.flood()
    before = [sequence.lora_index for sequence in go]
    for number, sequence in enumerate(go):
        sequence.slot = Slot(served.slot(served.adapters[number]), 16, 0, 0)
    assert [sequence.lora_index for sequence in go] != before
    assert {one.token_id for one in moved.decode(go)} == {one.token_id for one in expected}
    assert [one.tokens for one in go] == [one.tokens for one in stay]


def test_which_steps_are_taken(served: Served) -> None:
    rows = Rows(served, [1, 4], [StepShape(0, 8, 16), StepShape(4, 8, 16), StepShape(4, 8, 32)])
    graphs = rows.runner.graphs
    assert graphs is not None
    sequence = rows.add(0, 30, None, GREEDY)

    def shape(decode: int, *chunks: int) -> StepShape | None:
        prompts = [PlannedRow(sequence, 0, length, samples=False) for length in chunks]
        return graphs.shape_of(StepPlan((*[PlannedRow(sequence, 30, 31, samples=True)] * decode, *prompts), decode))

    assert shape(1) == StepShape(1, 0, 0)
    assert shape(2) == shape(4) == StepShape(4, 0, 0)
    assert shape(5) is None, "more rows than the largest"
    assert shape(0, 9, 7) == StepShape(0, 8, 16)
    assert shape(1, 9, 7) == StepShape(4, 8, 16)
    assert shape(1, 9, 8) == shape(0, 17) == StepShape(4, 8, 32)
    assert shape(4, 30, 3) is None, "more tokens than the largest"
    assert shape(0, *[1] * 9) is None, "more prompts than there is room for"


def test_steps_with_prompts_draw_what_the_others_draw(served: Served) -> None:
    """Decoding rows beside chunks that end their prompts and chunks that do not, with and without adapters."""
    shapes = [StepShape(0, 8, 12), StepShape(6, 8, 12), StepShape(6, 8, 40)]
    results = []
    for rows in (Rows(served, None), Rows(served, [6], shapes)):
        decoding = mixed(rows, 3)
        long = rows.sequence(20, 23, served.adapters[2], DRAWN)
        short = rows.sequence(21, 5, None, GREEDY)
        taken: list[int | None] = []
        for chunks in ([(long, 8)], [(long, 18), (short, 5)], [(long, 23)], []):
            sampled = rows.step(decoding, chunks)
            taken += [one.token_id for one in sampled]
            decoding += [sequence for sequence, end in chunks if end == sequence.prompt_tokens]
        rows.decode(decoding)
        results.append(([one.tokens for one in decoding], taken))
    assert results[0] == results[1]


def test_base_prompts_beside_base_rows_take_the_step_without_lora(served: Served) -> None:
    rows = Rows(served, [2], [StepShape(2, 8, 12)])
    graphs = rows.runner.graphs
    assert graphs is not None
    base, other = rows.add(0, 5, None, GREEDY), rows.sequence(1, 6, None, GREEDY)
    tenant = rows.sequence(2, 6, served.adapters[0], GREEDY)
    shape = StepShape(2, 8, 12)

    def level(*sequences: Sequence) -> int:
        prompts = [PlannedRow(one, 0, 6, samples=True) for one in sequences]
        return graphs._level(StepPlan((PlannedRow(base, 5, 6, samples=True), *prompts), 1), shape)

    assert level(other) == -1
    assert level(other, tenant) == 2


@pytest.mark.parametrize("most", [1, 2, 5, 8, 64, 100, 256])
def test_buckets_reach_the_most_rows_and_waste_little(most: int) -> None:
    buckets = row_buckets(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    for rows in range(1, most + 1):
        padded = min(bucket for bucket in buckets if bucket >= rows)
        assert padded - rows < max(8, 0.2 * rows + 8)


@pytest.mark.parametrize("most", [1, 100, 128, 200, 2048, 3000, 8192])
def test_prompts_are_padded_by_less_than_half(most: int) -> None:
    buckets = prefill_buckets(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    for tokens in range(1, most + 1):
        padded = min(bucket for bucket in buckets if bucket >= tokens)
        assert padded - tokens < max(128, tokens / 2)


def test_every_step_with_prompts_has_a_shape() -> None:
    """Whatever the scheduler plans within its budgets, up to 8 prompts at least."""
    rows, mixed, most = 64, 256, 2048
    shapes = step_shapes(rows, prefill_buckets(most), mixed)
    assert shapes == sorted(shapes, key=lambda shape: shape.tokens, reverse=True)
    with_prompts = [shape for shape in shapes if shape.prefill_rows]
    assert min(shape.prefill_rows for shape in with_prompts) == 8
    assert max(shape.prefill_rows for shape in with_prompts) <= rows
    for decoding in range(rows):
        late = rows - decoding
        budget = min(most, mixed * max(late, decoding) // decoding if decoding else most)
        for tokens in {1, 127, 128, 129, 256, 257, 700, budget}:
            fits = [shape for shape in with_prompts if shape.prefill_tokens >= tokens and shape.decode_rows >= decoding]
            assert tokens > budget or min(shape.prefill_tokens for shape in fits) == min(
                bucket for bucket in prefill_buckets(most) if bucket >= tokens
            )


def test_shapes_without_prompts() -> None:
    assert step_shapes(64, (), 256) == [StepShape(bucket, 0, 0) for bucket in reversed(row_buckets(64))]

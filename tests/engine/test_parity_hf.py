"""Logits of mixed batches against transformers + peft, one adapter at a time.

What holds on the CPU, and is tested here: a step of the same number of tokens gives a row the same bits whoever
shares it, whatever its place among them, wherever its adapter lies in the arena and whichever pages it has. Between
steps of different numbers of tokens (another chunking, more rows) torch may pick other matrix kernels; then
``TOLERANCE`` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.model import DecoderModel
from engine.weights import load_weights
from tests.engine.oracle import TinyModel
from tests.engine.paged import PagedRunner, Row
from tests.engine.served import BASE, CASES, TOLERANCE, Served, prompt, rows_of, serve

MakeModel = Callable[..., TinyModel]


@pytest.fixture
def llama(tiny_model: MakeModel) -> Served:
    return serve(tiny_model("llama"))


@pytest.mark.parametrize("case", CASES)
def test_mixed_batches_equal_each_adapter_alone(tiny_model: MakeModel, case: str) -> None:
    """Chunked prefill over cached prefixes beside decoding rows; pages and poison as a busy engine leaves them."""
    served = serve(tiny_model(**CASES[case]))
    rows = rows_of(served, [5, 23, 9, 17, 12, 30, 3, 14, 21, 7])
    runner = served.runner()
    runner.mixed_run([row for row, _ in rows], new_tokens=6, max_chunk=9)
    for row, adapter in rows:
        served.check(row, adapter)
    assert served.pool.arena.isnan().any()  # free slots were poisoned


@pytest.mark.parametrize("case", CASES)
def test_every_adapter_moves_the_logits(tiny_model: MakeModel, case: str) -> None:
    """Guards the test above: an adapter that changes nothing could not show a wrong one."""
    served = serve(tiny_model(**CASES[case]))
    tokens = prompt(20, seed=9)
    outputs = [served.tiny.logits(tokens, adapter) for adapter in (None, *served.adapters)]
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("case", ["llama-llama3", "llama-linear", "qwen3-yarn", "mistral-window", "qwen2-window"])
def test_rope_variants_and_windows_move_the_logits(tiny_model: MakeModel, case: str) -> None:
    """Guards the parity of these cases: a variant without effect could not show a wrong one."""
    tiny = tiny_model(**CASES[case])
    served = serve(tiny)
    spec = served.model.spec
    plain = replace(spec, rope=replace(spec.rope, type="default"), sliding_windows=(0,) * spec.num_layers)
    model = DecoderModel(plain, torch.float32, "cpu", 128)
    load_weights(model, tiny.path)
    row = Row(prompt(30, seed=1), BASE)
    PagedRunner(model).step([], [(row, 30)])
    assert (torch.stack(row.logits) - tiny.logits(row.tokens)).abs().max() > 0.05


def test_one_chunk_pure_decode_and_base_only_steps(llama: Served) -> None:
    rows = rows_of(llama, [6, 11, 8])
    runner = llama.runner()
    for row, _ in rows:
        runner.step([], [(row, len(row.tokens))])
        row.append_greedy()
    for _ in range(5):
        runner.step([row for row, _ in rows])
        for row, _ in rows:
            row.append_greedy()
    base = Row(prompt(9, seed=3), BASE)
    runner.step([rows[0][0]], [(base, 9)], has_lora=False)  # no row here has an adapter
    runner.step([rows[1][0], rows[2][0]])
    for row, adapter in [*rows, (base, None)]:
        llama.check(row, adapter)


def test_only_wanted_logits_are_computed(llama: Served) -> None:
    rows = [row for row, _ in rows_of(llama, [6, 11, 8])]
    runner = llama.runner()
    chunks = [(row, len(row.tokens)) for row in rows]
    inputs = runner.plan([], chunks)
    everything = llama.model.forward(inputs, runner.kv, llama.lora)
    wanted = torch.tensor([24, 5, 16])
    logits = llama.model.forward(replace(inputs, logit_tokens=wanted), runner.kv, llama.lora)
    assert logits.shape == (3, 211)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, everything[wanted], rtol=0, atol=TOLERANCE)
    none = llama.model.forward(replace(inputs, logit_tokens=wanted[:0]), runner.kv, llama.lora)
    assert none.shape == (0, 211)


def test_padding_rows_touch_nothing(llama: Served) -> None:
    """A step padded to a larger batch, as a captured graph replays it, gives the same rows."""
    rows = rows_of(llama, [6, 11])
    runner = llama.runner()
    runner.step([], [(row, len(row.tokens)) for row, _ in rows])
    for row, _ in rows:
        row.append_greedy()
    before = [cache.clone() for cache in (*runner.kv.keys, *runner.kv.values)]
    inputs = runner.plan([row for row, _ in rows], [])

    def pad(tensor: Tensor, value: int) -> Tensor:
        return torch.cat((tensor, torch.full((2, *tensor.shape[1:]), value, dtype=tensor.dtype)))

    padded = replace(
        inputs,
        token_ids=pad(inputs.token_ids, 0),
        positions=pad(inputs.positions, 0),
        kv_slots=pad(inputs.kv_slots, -1),
        page_table=pad(inputs.page_table, 0),
        query_starts=torch.arange(5, dtype=torch.int32),
        context_lens=pad(inputs.context_lens, 0),
        lora_indices=pad(inputs.lora_indices, -1),
        logit_tokens=torch.arange(4),
        num_decode_rows=4,
        num_lora_rows=4,
    )
    logits = llama.model.forward(padded, runner.kv, llama.lora)
    for index, (row, adapter) in enumerate(rows):
        expected = llama.tiny.logits(row.tokens, adapter)[-1]
        assert (logits[index] - expected).abs().max() <= TOLERANCE
    written = set(inputs.kv_slots.tolist())
    for old, new in zip(before, (*runner.kv.keys, *runner.kv.values), strict=True):
        others = [slot for slot in range(old.shape[0] * old.shape[1]) if slot not in written]
        assert torch.equal(old.flatten(0, 1)[others].nan_to_num(7.0), new.flatten(0, 1)[others].nan_to_num(7.0))


def test_eviction_and_reload_elsewhere_change_no_bit(llama: Served) -> None:
    def run(seed: int) -> tuple[list[Tensor], list[int]]:
        rows = rows_of(llama, [6, 13, 8, 21, 10])
        llama.runner(seed).mixed_run([row for row, _ in rows], new_tokens=4, max_chunk=8)
        return [torch.stack(row.logits) for row, _ in rows], [row.slot for row, _ in rows]

    first, slots = run(seed=5)
    llama.flood()
    assert llama.pool.stats().evictions == len(llama.adapters)
    again, moved = run(seed=5)
    assert all(one != other for one, other in zip(slots[1:], moved[1:], strict=True))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_neighbours_and_pages_change_no_bit(llama: Served) -> None:
    qv, everything, o_down, mlp = llama.adapters
    expected = llama.among((None, None, None), seed=1)
    llama.check(expected, everything)
    for seed, neighbours in enumerate([(qv, everything, o_down), (everything, everything, None), (mlp, None, qv)]):
        row = llama.among(neighbours, seed + 2)
        assert torch.equal(torch.stack(row.logits), torch.stack(expected.logits))


def test_place_in_the_step_changes_no_bit(llama: Served) -> None:
    def run(place: int) -> Tensor:
        adapters = [None, *llama.adapters, llama.adapters[2]]
        rows = [Row(prompt(12, seed=20 + index), llama.slot(adapter)) for index, adapter in enumerate(adapters)]
        row = Row(prompt(12, seed=1), llama.slot(llama.adapters[1]))
        rows.insert(place, row)
        runner = llama.runner()
        runner.step([], [(each, 12) for each in rows])
        for _ in range(3):
            for each in rows:
                each.append_greedy()
            runner.step(rows)
        return torch.stack(row.logits)

    first = run(0)
    for place in (1, 3, 6):
        assert torch.equal(run(place), first)


def test_chunking_changes_nothing_beyond_the_tolerance(llama: Served) -> None:
    results = []
    for sizes in ([24], [5, 19], [1] * 24, [7, 8, 9]):
        row = Row(prompt(24, seed=2), llama.slot(llama.adapters[1]))
        runner = llama.runner()
        for size in sizes:
            runner.step([], [(row, size)])
        llama.check(row, llama.adapters[1])
        results.append(torch.stack(row.logits))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=TOLERANCE)


def test_bf16_is_as_close_as_transformers_own_bf16(tiny_model: MakeModel) -> None:
    tiny = tiny_model("llama")
    served = serve(tiny, torch.bfloat16)
    rows = rows_of(served, [9, 23, 14, 17, 12])
    served.runner().mixed_run([row for row, _ in rows], new_tokens=4, max_chunk=9)
    served.check_bf16(rows)

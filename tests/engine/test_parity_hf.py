"""Logits of mixed batches against transformers + peft, one adapter at a time.

What holds on the CPU, and is tested here: a step of the same number of tokens gives a row the same bits whoever
shares it, wherever the row's adapter lies in the arena and whichever pages it has. Between steps of different
numbers of tokens (another chunking, more rows) torch may pick other matrix kernels; then ``TOLERANCE`` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.slots import SlotPool
from engine.lora_targets import adapter_layout
from engine.model import DecoderModel
from engine.spec import ModelSpec
from engine.step import LoraState
from engine.weights import load_weights
from tests.engine.oracle import ATTENTION, MLP, TinyAdapter, TinyModel
from tests.engine.paged import PagedRunner, Row

TOLERANCE = 2e-5  # fp32 logits; they are of order 1 to 5
MakeModel = Callable[..., TinyModel]

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-3-layers-gqa-1": {"model_type": "llama", "num_hidden_layers": 3, "num_key_value_heads": 4},
    "llama-bias-tied": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    },
    "llama-llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral-gqa-3": {
        "model_type": "mistral",
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "sliding_window": None,
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "num_key_value_heads": 2},
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "num_key_value_heads": 4},
    "qwen3-yarn": {
        "model_type": "qwen3",
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
BASE = -1


@dataclass(frozen=True, slots=True)
class Served:
    """A tiny model with its adapters in slots; free slots hold NaN."""

    tiny: TinyModel
    model: DecoderModel
    pool: SlotPool
    lora: LoraState
    adapters: tuple[TinyAdapter, ...]

    def slot(self, adapter: TinyAdapter) -> int:
        """The adapter's slot, loading it when it has none and putting out the least recently used if need be."""
        packed = pack_checkpoint(adapter.path, self.pool.layout, 16, self.model.dtype, adapter.name)
        slot = self.pool.acquire(packed.digest, packed.rank)
        assert slot is not None
        if not slot.loaded:
            self.pool.load(slot, packed)
        self.pool.release(slot)
        return slot.index

    def runner(self, seed: int = 0) -> PagedRunner:
        return PagedRunner(self.model, self.lora, seed=seed)

    def check(self, row: Row, adapter: TinyAdapter | None) -> None:
        """Every logit row within TOLERANCE of the oracle's, every greedy choice equal."""
        assert row.done == len(row.tokens) == len(row.logits)
        actual, expected = torch.stack(row.logits), self.tiny.logits(row.tokens, adapter)
        assert actual.isfinite().all()
        assert (actual - expected).abs().max() <= TOLERANCE
        assert torch.equal(actual.argmax(1), expected.argmax(1))


def serve(tiny: TinyModel, dtype: torch.dtype = torch.float32) -> Served:
    """Adapters of ranks 4, 8 and 16 with different targets and scales, and slots that are partly free."""
    adapters = (
        tiny.adapter("qv-4", 4, ("q_proj", "v_proj"), alpha=12, strength=1.0, seed=1),
        tiny.adapter("all-8", 8, ATTENTION + MLP, seed=2),
        tiny.adapter("o-down-16", 16, ("o_proj", "down_proj"), alpha=8, use_rslora=True, seed=3),
        tiny.adapter("mixed-ranks-8", 8, MLP, rank_pattern={"up_proj": 3}, alpha_pattern={"up_proj": 9}, seed=4),
    )
    spec = ModelSpec.from_dir(tiny.path)
    model = DecoderModel(spec, dtype, "cpu", 128)
    load_weights(model, tiny.path)
    layout = adapter_layout(spec)
    pool = SlotPool(layout, {4: 2, 8: 3, 16: 2}, dtype, "cpu", poison=True)
    groups = tuple(layout.lora_groups(layer) for layer in range(spec.num_layers))
    lora = LoraState(pool.arena, pool.slot_table, groups, pool.max_rank)
    return Served(tiny, model, pool, lora, adapters)


@pytest.fixture
def llama(tiny_model: MakeModel) -> Served:
    return serve(tiny_model("llama"))


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 211, (length,), generator=generator).tolist()


def rows_of(served: Served, lengths: Sequence[int]) -> list[tuple[Row, TinyAdapter | None]]:
    """Rows that take turns: the base model, then each adapter."""
    choices: list[TinyAdapter | None] = [None, *served.adapters]
    rows = []
    for index, length in enumerate(lengths):
        adapter = choices[index % len(choices)]
        slot = BASE if adapter is None else served.slot(adapter)
        rows.append((Row(prompt(length, seed=index), slot), adapter))
    return rows


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
    for rank, count in ((16, 2), (8, 3), (4, 2)):
        for seed in range(count):
            llama.slot(llama.tiny.adapter(f"other-{rank}-{seed}", rank, seed=50 + seed))
    assert llama.pool.stats().evictions == len(llama.adapters)
    again, moved = run(seed=5)
    assert all(one != other for one, other in zip(slots[1:], moved[1:], strict=True))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_neighbours_and_pages_change_no_bit(llama: Served) -> None:
    """The same row through steps of the same shape, among other adapters, tokens, context lengths and pages."""

    def run(neighbours: Sequence[TinyAdapter | None], seed: int) -> Tensor:
        runner = llama.runner(seed)
        row = Row(prompt(12, seed=1), llama.slot(llama.adapters[1]))
        others = []
        for index, adapter in enumerate(neighbours):
            slot = BASE if adapter is None else llama.slot(adapter)
            others.append(Row(prompt(30, seed=100 * seed + index), slot))
        for other in others:
            runner.step([], [(other, 3 + other.tokens[0] % 17)])  # prefixes of their own lengths
        first, second, third = others
        runner.step([], [(first, 4), (row, 7), (second, 2)])
        runner.step([third], [(row, 5), (first, 3)])
        for _ in range(4):
            row.append_greedy()
            runner.step([second, row, third], [(first, 1)])
        llama.check(row, llama.adapters[1])
        return torch.stack(row.logits)

    qv, everything, o_down, mlp = llama.adapters
    expected = run([None, None, None], seed=1)
    for seed, neighbours in enumerate([(qv, everything, o_down), (everything, everything, None), (mlp, None, qv)]):
        assert torch.equal(run(neighbours, seed + 2), expected)


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
    """In bf16 our largest error against fp32 stays within 1.5 times that of transformers' bf16 run."""
    tiny = tiny_model("llama")
    served = serve(tiny, torch.bfloat16)
    rows = rows_of(served, [9, 23, 14, 17, 12])
    served.runner().mixed_run([row for row, _ in rows], new_tokens=4, max_chunk=9)
    ours, theirs = [], []
    for row, adapter in rows:
        expected = tiny.logits(row.tokens, adapter)
        theirs.append((tiny.logits(row.tokens, adapter, torch.bfloat16) - expected).abs())
        ours.append((torch.stack(row.logits) - expected).abs())
    assert torch.cat(ours).max() <= 1.5 * torch.cat(theirs).max()
    assert torch.cat(ours).mean() <= 1.5 * torch.cat(theirs).mean()

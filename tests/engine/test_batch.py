"""A plan as tensors, against the same worked out token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.slots import Slot
from engine.batch import padded_arrays, step_inputs, to_device
from engine.request import GenerationRequest, SamplingParams
from engine.scheduler import PlannedRow, StepPlan
from engine.sequence import Sequence
from engine.step_shapes import StepShape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
PAGE = 4


def planned(index: int, start: int, count: int, samples: bool, slot: int) -> PlannedRow:
    """A row whose pages are scattered and whose token at position p is 100 * index + p."""
    end = start + count
    sampling = SamplingParams(temperature=0.5 + index, top_k=index, top_p=1 / (1 + index), min_p=0.1 * index)
    sequence = Sequence(
        GenerationRequest(f"{index}", tuple(range(100 * index, 100 * index + end)), sampling), index, 99, 7 + index
    )
    sequence.computed = start
    sequence.pages = [(index * 31 + page * 7) % 1000 for page in range(-(-end // PAGE) + index % 2)]
    sequence.slot = None if slot < 0 else Slot(slot, 8, 0, 0)
    return PlannedRow(sequence, start, end, samples)


rows = st.tuples(st.integers(0, 20), st.integers(1, 11), st.booleans(), st.integers(-1, 5))


@settings(deadline=None)
@given(decode=st.lists(rows, max_size=4), prefill=st.lists(rows, max_size=4))
@pytest.mark.parametrize("device", DEVICES)
def test_step_inputs(
    device: str, decode: list[tuple[int, int, bool, int]], prefill: list[tuple[int, int, bool, int]]
) -> None:
    plan_rows = [planned(i, start, 1, True, slot) for i, (start, _, _, slot) in enumerate(decode)]
    plan_rows += [planned(len(decode) + i, *row) for i, row in enumerate(prefill)]
    if not plan_rows:
        return
    inputs, _ = step_inputs(StepPlan(tuple(plan_rows), len(decode)), PAGE, torch.device(device))
    tokens, positions, kv_slots, starts, wanted = [], [], [], [0], []
    for row in plan_rows:
        for position in range(row.start, row.end):
            tokens.append(row.sequence.tokens[position])
            positions.append(position)
            kv_slots.append(row.sequence.pages[position // PAGE] * PAGE + position % PAGE)
        starts.append(len(tokens))
        wanted += [len(tokens) - 1] if row.samples else []
    assert inputs.token_ids.tolist() == tokens
    assert inputs.positions.tolist() == positions
    assert inputs.kv_slots.tolist() == kv_slots
    assert inputs.query_starts.tolist() == starts
    assert inputs.context_lens.tolist() == [row.end for row in plan_rows]
    assert inputs.lora_indices.tolist() == [row.sequence.lora_index for row in plan_rows]
    assert inputs.logit_tokens.tolist() == wanted
    for table_row, row in zip(inputs.page_table.tolist(), plan_rows, strict=True):
        assert table_row[: len(row.sequence.pages)] == row.sequence.pages
    assert inputs.num_decode_rows == len(decode)
    assert inputs.num_lora_rows <= len(decode)
    assert (inputs.lora_indices[inputs.num_lora_rows : len(decode)] < 0).all()
    assert inputs.num_lora_rows == 0 or inputs.lora_indices[inputs.num_lora_rows - 1] >= 0
    assert inputs.max_query_len == max((count for _, count, *_ in prefill), default=0)
    assert inputs.has_lora == any(row.sequence.slot is not None for row in plan_rows)
    narrow = (inputs.page_table, inputs.query_starts, inputs.context_lens, inputs.lora_indices)
    wide = (inputs.token_ids, inputs.positions, inputs.kv_slots, inputs.logit_tokens)
    assert {tensor.dtype for tensor in narrow} == {torch.int32}
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    assert {tensor.device.type for tensor in (*narrow, *wide)} == {device}


def test_sampling_inputs() -> None:
    rows = tuple(planned(index, index, 3, index != 1, -1) for index in range(4))
    _, made = step_inputs(StepPlan(rows, 0), PAGE, torch.device("cpu"))
    assert made.temperature.tolist() == [0.5, 2.5, 3.5]
    assert made.top_k.tolist() == [0, 2, 3]
    assert made.top_p.tolist() == [1, 1 / 3, 1 / 4]
    assert made.min_p.tolist() == pytest.approx([0, 0.2, 0.3])
    assert made.seed.tolist() == [7, 9, 10]
    assert made.position.tolist() == [3, 5, 6]  # the drawn token comes right after the row's last


def test_a_padded_step() -> None:
    rows = [planned(index, 3 * index, 1, True, index - 1) for index in range(3)]
    prompts = [planned(3, 2, 4, False, 2), planned(4, 0, 3, True, -1)]
    plan = StepPlan((*rows, *prompts), 3)
    plain, _ = step_inputs(plan, PAGE, torch.device("cpu"))
    shape = StepShape(5, 4, 11)
    padded = padded_arrays(plan, shape, 7, PAGE)
    assert shape.places(plan) == [0, 1, 2, 5, 6]
    for name in ("context_lens", "lora_indices"):
        assert padded[name][shape.places(plan)].tolist() == getattr(plain, name).tolist()
    for name in ("token_ids", "positions", "kv_slots"):
        assert [*padded[name][:3], *padded[name][5:12]] == getattr(plain, name).tolist()
    width = plain.page_table.shape[1]
    assert padded["page_table"].shape == (9, 7)
    assert padded["page_table"][shape.places(plan), :width].tolist() == plain.page_table.tolist()
    assert padded["query_starts"].tolist() == [0, 1, 2, 3, 4, 5, 9, 12, 12, 12]
    assert padded["logit_tokens"].tolist()[:7] == [0, 1, 2, 3, 4, 8, 11]
    assert max(padded["logit_tokens"]) < 16
    for row in (3, 4, 7, 8):
        assert padded["context_lens"][row] == 0
        assert padded["lora_indices"][row] == -1
        assert padded["temperature"][row] == 0, "a padding row takes the shortest way through the sampler"
    for token in (3, 4, 12, 13, 14, 15):
        assert padded["kv_slots"][token] == -1
    assert padded["seed"][shape.places(plan)].tolist() == [row.sequence.seed for row in plan.rows]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_of_any_size_and_type_arrive_whole(device: str) -> None:
    arrays = {
        f"{dtype}-{count}": torch.arange(count, dtype=dtype).numpy()
        for dtype in (torch.uint8, torch.int32, torch.int64, torch.float64)
        for count in (0, 1, 3, 17)
    }
    arrays["table"] = torch.arange(15, dtype=torch.int32).view(3, 5).numpy()
    for name, tensor in to_device(arrays, torch.device(device)).items():
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), torch.from_numpy(arrays[name]))

"""A step's plan as tensors: built on the host as arrays, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.scheduler import PlannedRow, StepPlan
from engine.step import StepInputs

_ALIGNMENT = 16  # bytes; every array starts where any of its element types may


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """How each of the rows that draw a token does it, on the host: (O,) each, in the order of the logits."""

    temperature: Tensor  # fp64
    top_k: Tensor  # int64
    top_p: Tensor  # fp64
    min_p: Tensor  # fp64
    seed: Tensor  # int64
    position: Tensor  # int64: the drawn token's


def step_inputs(plan: StepPlan, page_size: int, device: torch.device) -> StepInputs:
    """The tensors of ``plan`` on ``device``; nothing waits for the device."""
    rows = plan.rows
    token_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    query_starts = [0]
    for row in rows:
        token_ids += row.sequence.tokens[row.start : row.end]
        positions += range(row.start, row.end)
        _add_kv_slots(kv_slots, row, page_size)
        query_starts.append(len(token_ids))
    page_table = np.zeros((len(rows), max(len(row.sequence.pages) for row in rows)), dtype=np.int32)
    for table_row, row in zip(page_table, rows, strict=True):
        table_row[: len(row.sequence.pages)] = row.sequence.pages
    lora_indices = [row.sequence.lora_index for row in rows]
    logit_tokens = [end - 1 for row, end in zip(rows, query_starts[1:], strict=True) if row.samples]
    tensors = to_device(
        {
            "token_ids": np.array(token_ids, dtype=np.int64),
            "positions": np.array(positions, dtype=np.int64),
            "kv_slots": np.array(kv_slots, dtype=np.int64),
            "page_table": page_table,
            "query_starts": np.array(query_starts, dtype=np.int32),
            "context_lens": np.array([row.end for row in rows], dtype=np.int32),
            "lora_indices": np.array(lora_indices, dtype=np.int32),
            "logit_tokens": np.array(logit_tokens, dtype=np.int64),
        },
        device,
    )
    return StepInputs(
        **tensors,
        num_decode_rows=plan.num_decode,
        num_lora_rows=max((row + 1 for row in range(plan.num_decode) if lora_indices[row] >= 0), default=0),
        max_query_len=max((row.end - row.start for row in rows[plan.num_decode :]), default=0),
        has_lora=any(index >= 0 for index in lora_indices),
    )


def sampling_inputs(rows: Sequence[PlannedRow]) -> SamplingInputs:
    """The parameters of ``rows``, all of which draw a token."""
    params: list[SamplingParams] = [row.sequence.request.sampling for row in rows]
    return SamplingInputs(
        temperature=torch.tensor([one.temperature for one in params], dtype=torch.float64),
        top_k=torch.tensor([one.top_k for one in params], dtype=torch.int64),
        top_p=torch.tensor([one.top_p for one in params], dtype=torch.float64),
        min_p=torch.tensor([one.min_p for one in params], dtype=torch.float64),
        seed=torch.tensor([row.sequence.seed for row in rows], dtype=torch.int64),
        position=torch.tensor([row.end for row in rows], dtype=torch.int64),
    )


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on ``device``. On CUDA all of them share one pinned buffer and one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    starts: dict[str, int] = {}
    size = 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    # A fresh buffer each step: torch keeps it from being reused before the copy has read it.
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    filled = host.numpy()
    for name, array in arrays.items():
        filled[starts[name] : starts[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
    sent = host.to(device, non_blocking=True)
    return {
        name: sent[starts[name] : starts[name] + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for name, array in arrays.items()
    }


def _add_kv_slots(kv_slots: list[int], row: PlannedRow, page_size: int) -> None:
    position = row.start
    while position < row.end:
        page, offset = divmod(position, page_size)
        count = min(page_size - offset, row.end - position)
        first = row.sequence.pages[page] * page_size + offset
        kv_slots += range(first, first + count)
        position += count

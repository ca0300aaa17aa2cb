"""A step's plan as tensors: built on the host as arrays, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.scheduler import PlannedRow, StepPlan
from engine.sequence import PENDING
from engine.step import StepInputs
from engine.step_shapes import StepShape
from kernels.logit_changes import ChangeState, LogitChanges
from kernels.sampling import sample_with_logprob

_ALIGNMENT = 16  # bytes; every array starts where any of its element types may


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """How each of the rows that draw a token does it: (O,) each, in the order of the logits."""

    temperature: Tensor  # fp64
    top_k: Tensor  # int64
    top_p: Tensor  # fp64
    min_p: Tensor  # fp64
    seed: Tensor  # int64
    position: Tensor  # int64: the drawn token's
    place: Tensor  # int32: where what changes the row's logits is, -1 for a row that is left as it is
    mask_row: Tensor  # int32: which mask bars tokens of the row, -1 for none

    def draw(self, logits: Tensor, state: ChangeState) -> tuple[Tensor, Tensor]:
        """(token ids, their raw log probabilities): see :func:`kernels.sampling.sample_with_logprob`."""
        changes = LogitChanges(state, self.place, self.mask_row)
        return sample_with_logprob(
            logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.position, changes
        )

    @classmethod
    def names(cls) -> frozenset[str]:
        """The names of the fields."""
        return frozenset(entry.name for entry in fields(cls))


def step_inputs(
    plan: StepPlan, page_size: int, device: torch.device, drawn: Tensor | None = None
) -> tuple[StepInputs, SamplingInputs]:
    """The tensors of ``plan`` on ``device``, in one copy; nothing waits for the device.

    drawn: ids that the step before this one drew; needed where tokens of the plan are not known on the host yet.
    """
    rows = plan.rows
    arrays = _step_arrays(rows, page_size, max(len(row.sequence.pages) for row in rows))
    arrays |= _sampling_arrays([row for row in rows if row.samples])
    tensors = to_device(arrays, device)
    sampling = SamplingInputs(**{name: tensors.pop(name) for name in SamplingInputs.names()})
    awaited = tensors.pop("awaited")
    if drawn is not None:
        tensors["token_ids"] = with_drawn(tensors["token_ids"], awaited, drawn)
    inputs = StepInputs(
        **tensors,
        num_decode_rows=plan.num_decode,
        num_lora_rows=plan.num_lora_rows,
        max_query_len=max((row.end - row.start for row in rows[plan.num_decode :]), default=0),
        has_lora=plan.has_lora,
    )
    return inputs, sampling


_PADDING = {
    "kv_slots": -1,
    "lora_indices": -1,
    "awaited": -1,
    "top_p": 1,
    "place": -1,
    "mask_row": -1,
}  # others are padded with 0
_OF_TOKENS = frozenset({"token_ids", "awaited", "positions", "kv_slots"})


def padded_arrays(plan: StepPlan, shape: StepShape, max_pages: int, page_size: int) -> dict[str, np.ndarray]:
    """Inputs of ``plan`` padded to ``shape`` and to page tables of ``max_pages``; a token is drawn for every row.

    Named as the fields of StepInputs and SamplingInputs; ``awaited`` is for :func:`with_drawn`.
    """
    decode, prefill = (
        _step_arrays(rows, page_size, max_pages) | _sampling_arrays(rows)
        for rows in (plan.rows[: plan.num_decode], plan.rows[plan.num_decode :])
    )
    starts = shape.decode_rows + prefill["query_starts"]  # of the chunks, and where the last one ends
    ends = np.full(shape.prefill_rows - len(starts) + 1, starts[-1], dtype=np.int32)
    own = {"query_starts", "logit_tokens"}
    arrays: dict[str, np.ndarray] = {}
    for name in decode.keys() - own:
        more = shape.prefill_tokens if name in _OF_TOKENS else shape.prefill_rows
        arrays[name] = np.concatenate(
            [_padded(name, decode[name], shape.decode_rows), _padded(name, prefill[name], more)]
        )
    arrays["query_starts"] = np.concatenate([np.arange(shape.decode_rows, dtype=np.int32), starts, ends])
    arrays["logit_tokens"] = np.maximum(arrays["query_starts"][1:] - 1, 0).astype(np.int64)
    return arrays


def _padded(name: str, array: np.ndarray, count: int) -> np.ndarray:
    beyond = np.full((count - array.shape[0], *array.shape[1:]), _PADDING.get(name, 0), array.dtype)
    return np.concatenate([array, beyond])


def with_drawn(token_ids: Tensor, awaited: Tensor, drawn: Tensor) -> Tensor:
    """``token_ids`` with ``drawn[awaited]`` where that is not -1; all on the device, (T,) int64 and drawn longer."""
    return torch.where(awaited < 0, token_ids, drawn[awaited.clamp(min=0)])


def _step_arrays(rows: Sequence[PlannedRow], page_size: int, max_pages: int) -> dict[str, np.ndarray]:
    token_ids: list[int] = []
    awaited: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    query_starts = [0]
    for row in rows:
        tokens = row.sequence.tokens[row.start : row.end]
        assert PENDING not in tokens[:-1]
        awaited += [-1] * len(tokens)
        if tokens[-1] == PENDING:
            awaited[-1], tokens[-1] = row.sequence.awaited, 0
        token_ids += tokens
        positions += range(row.start, row.end)
        _add_kv_slots(kv_slots, row, page_size)
        query_starts.append(len(token_ids))
    page_table = np.zeros((len(rows), max_pages), dtype=np.int32)
    for table_row, row in zip(page_table, rows, strict=True):
        table_row[: len(row.sequence.pages)] = row.sequence.pages
    logit_tokens = [end - 1 for row, end in zip(rows, query_starts[1:], strict=True) if row.samples]
    return {
        "token_ids": np.array(token_ids, dtype=np.int64),
        "awaited": np.array(awaited, dtype=np.int64),
        "positions": np.array(positions, dtype=np.int64),
        "kv_slots": np.array(kv_slots, dtype=np.int64),
        "page_table": page_table,
        "query_starts": np.array(query_starts, dtype=np.int32),
        "context_lens": np.array([row.end for row in rows], dtype=np.int32),
        "lora_indices": np.array([row.sequence.lora_index for row in rows], dtype=np.int32),
        "logit_tokens": np.array(logit_tokens, dtype=np.int64),
    }


def _sampling_arrays(rows: Sequence[PlannedRow]) -> dict[str, np.ndarray]:
    """The parameters of ``rows``; what those draw that are not to is of no use, and not counted."""
    params: list[SamplingParams] = [row.sequence.request.sampling for row in rows]
    return {
        "temperature": np.array([one.temperature for one in params], dtype=np.float64),
        "top_k": np.array([one.top_k for one in params], dtype=np.int64),
        "top_p": np.array([one.top_p for one in params], dtype=np.float64),
        "min_p": np.array([one.min_p for one in params], dtype=np.float64),
        "seed": np.array([row.sequence.seed for row in rows], dtype=np.int64),
        "position": np.array([row.end for row in rows], dtype=np.int64),
        "place": np.array([row.sequence.place if row.samples else -1 for row in rows], dtype=np.int32),
        "mask_row": np.array([row.sequence.mask_row if row.samples else -1 for row in rows], dtype=np.int32),
    }


def places(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """Where each array starts in one buffer that holds them all, and the buffer's size; in bytes."""
    starts: dict[str, int] = {}
    size = 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, size


def write_arrays(host: Tensor, starts: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
    """Put each array at its place in ``host``, (bytes,) uint8 on the CPU."""
    filled = host.numpy()
    for name, start in starts.items():
        filled[start : start + arrays[name].nbytes] = arrays[name].reshape(-1).view(np.uint8)


def array_views(buffer: Tensor, starts: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Each array's place in ``buffer``, (bytes,) uint8, as a tensor of its shape and type."""
    return {
        name: buffer[start : start + arrays[name].nbytes]
        .view(torch.from_numpy(arrays[name]).dtype)
        .view(arrays[name].shape)
        for name, start in starts.items()
    }


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on ``device``. On CUDA all of them share one pinned buffer and one copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    starts, size = places(arrays)
    # A fresh buffer each step: torch keeps it from being reused before the copy has read it.
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    write_arrays(host, starts, arrays)
    return array_views(host.to(device, non_blocking=True), starts, arrays)


def _add_kv_slots(kv_slots: list[int], row: PlannedRow, page_size: int) -> None:
    position = row.start
    while position < row.end:
        page, offset = divmod(position, page_size)
        count = min(page_size - offset, row.end - position)
        first = row.sequence.pages[page] * page_size + offset
        kv_slots += range(first, first + count)
        position += count

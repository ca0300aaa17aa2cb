"""Argument checks shared by the LoRA kernels: each refusal names the value and what to do about it.

They read shapes, strides, dtypes and devices only, so they cost no synchronisation, hold under CUDA-graph capture
and run on the fake tensors of ``torch.compile``. Tensor contents are checked for CPU tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.lora_group import RANK_STEP, LoraGroup

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MAX_ROWS = 65535  # rows lie on the launch grid's second axis, which CUDA limits to this
MAX_SLICES = 4  # the packed kernels take each slice's width as an argument of its own


def check_tensor(op: str, name: str, tensor: Tensor, shape: str, dtypes: Sequence[torch.dtype], like: Tensor) -> None:
    """Checks dimensions (counted in ``shape``, e.g. ``"(batch, rank)"``), dtype, last stride and device."""
    ndim = shape.count(",") + (0 if shape.endswith(",)") else 1)
    if tensor.ndim != ndim:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; pass a tensor of shape {shape}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}; convert it to one of {allowed}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tuple(tensor.stride())}, not contiguous "
            "along its last dimension; pass a contiguous tensor"
        )
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but inputs are on {like.device}; move them to one device")


def check_output(op: str, name: str, tensor: Tensor, rows_dim: int) -> None:
    """Checks that the rows that one launch writes in parallel do not overlap in memory."""
    if tensor.shape[rows_dim] > 1 and tensor.stride(rows_dim) < tensor.shape[-1]:
        raise ValueError(
            f"{op}: rows of {name} overlap: shape {tuple(tensor.shape)}, strides {tuple(tensor.stride())}; "
            "pass a tensor with its own memory for each row"
        )


def check_rows(op: str, expected: int, **sizes: int) -> None:
    """Checks that every named size equals the batch, ``expected``, and that the launch grid can hold it."""
    for name, size in sizes.items():
        if size != expected:
            raise ValueError(f"{op}: {name} has {size} rows but inputs have {expected}; give both the same batch")
    if expected > MAX_ROWS:
        raise ValueError(
            f"{op}: a batch of {expected} exceeds the {MAX_ROWS} rows of one launch; split it into several calls"
        )


def check_weights(
    op: str, name: str, weights: Tensor, shape: str, dtypes: Sequence[torch.dtype], inputs: Tensor
) -> Tensor:
    """Checks stacked adapter weights, ``(L, a, b)`` or ``(L, 1, a, b)``, and returns them as ``(L, a, b)``.

    The slot stride is free, so a view into a larger arena passes; the last two dimensions must be contiguous.
    """
    if weights.ndim == 4 and weights.shape[1] == 1:
        weights = weights.squeeze(1)
    if weights.ndim != 3:
        raise ValueError(
            f"{op}: {name} has shape {tuple(weights.shape)}; pass {shape} or the same with a 1 after lora_num"
        )
    check_tensor(op, name, weights, shape, dtypes, inputs)
    rows, columns = weights.shape[1:]
    if rows < 1 or columns < 1:
        raise ValueError(f"{op}: {name} has an empty dimension in {tuple(weights.shape)}; every size must be >= 1")
    if rows > 1 and weights.stride(1) != columns:
        raise ValueError(
            f"{op}: the last two dimensions of {name} are not contiguous (shape {tuple(weights.shape)}, strides "
            f"{tuple(weights.stride())}); only the slot stride is free: call .contiguous() or slice whole slots"
        )
    return weights


def check_arena(op: str, arena: Tensor, slot_table: Tensor, group: LoraGroup, inputs: Tensor) -> None:
    """Checks the arena of packed adapters, its slot table and the group's geometry."""
    check_tensor(op, "arena", arena, "(elements,)", FLOATS, inputs)
    check_tensor(op, "slot_table", slot_table, "(slots, 2)", (torch.int64,), inputs)
    if slot_table.shape[1] != 2 or not slot_table.is_contiguous():
        raise ValueError(
            f"{op}: slot_table has shape {tuple(slot_table.shape)}, strides {tuple(slot_table.stride())}; pass a "
            "contiguous (slots, 2) tensor of element offset and rank"
        )
    if not 1 <= group.slices <= MAX_SLICES:
        raise ValueError(
            f"{op}: a group of {group.slices} slices {group.out_features}; pack 1 to {MAX_SLICES} projections"
        )


def check_slots(op: str, slot_table: Tensor) -> None:
    """Checks that adapters lie at whole vectors, as they are packed: on CPU tensors only, where reading is free."""
    if slot_table.device.type != "cpu" or not (slot_table % RANK_STEP).any():
        return
    slot = int((slot_table % RANK_STEP).any(1).nonzero()[0])
    offset, rank = slot_table[slot].tolist()
    raise ValueError(
        f"{op}: slot {slot} has offset {offset} and rank {rank}; pack adapters at multiples of {RANK_STEP} and at "
        "their packed_rank, padded with zeros"
    )


def check_indices(op: str, indices: Tensor, slots: int) -> None:
    """Checks adapter indices against the number of slots: on CPU tensors only, where reading them is free."""
    if indices.device.type != "cpu":
        return
    for row, index in enumerate(indices.tolist()):
        if not -1 <= index < slots:
            raise ValueError(
                f"{op}: row {row} has adapter index {index}; use -1 for no adapter or one of the {slots} slots"
            )


def check_override(op: str, override: Mapping[str, int] | None, allowed: Sequence[str], powers: Sequence[str]) -> None:
    """Checks a caller's launch configuration: known keys, positive integers, powers of two where Triton needs them."""
    for key, value in (override or {}).items():
        if key not in allowed:
            raise ValueError(f"{op}: override_config has unknown key {key!r}; it takes {', '.join(allowed)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{op}: override_config[{key!r}] is {value!r}; give a positive integer")
        if key in powers and value & (value - 1):
            raise ValueError(f"{op}: override_config[{key!r}] is {value}; give a power of two")


def check_segments(op: str, starts: Tensor, tokens: int, max_segment: int) -> None:
    """Checks segment starts against the tokens and the longest segment: on CPU tensors only."""
    if starts.device.type != "cpu":
        return
    values = starts.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] < 0 or values[-1] > tokens or any(length < 0 for length in lengths):
        raise ValueError(f"{op}: segment_starts {values} must not decrease and must stay within 0 and {tokens} tokens")
    if max(lengths, default=0) > max_segment:
        raise ValueError(f"{op}: a segment has {max(lengths)} tokens but max_segment is {max_segment}; raise it")

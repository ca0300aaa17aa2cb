"""Torch twins of the LoRA kernels: the oracle beside each kernel, and what serves CPU tensors.

Each function has the name, signature and result of its Triton twin; arguments are checked by the public function
in the kernel's own module, so these take them as valid. Products and sums are fp32, rounded once to the output.

A row's result is the same bit for bit whatever shares its batch and wherever its adapter lies. CPU BLAS does not
give that for free: a matrix product's rows change with the number of rows beside them, and a matrix-vector product
with the address of its operands modulo 64 bytes (both seen with MKL). So a decode row is its own matrix-vector
product, a prefill segment its own matrix product, and operands are copied where they are not 64-byte aligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lora_group import LoraGroup

_ALIGNMENT = 64  # bytes: a cache line and the widest vector register


class _Slot(NamedTuple):
    """One live row or segment and where its adapter lies."""

    row: int
    offset: int
    rank: int


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, contiguous and at a 64-byte boundary (torch's CPU allocator gives such memory)."""
    tensor = tensor.float().contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _live_rows(slot_table: Tensor, lora_indices: Tensor) -> list[_Slot]:
    """The rows that have an adapter, with its element offset and rank, without reading the whole table."""
    indices = lora_indices.tolist()
    rows = [row for row, index in enumerate(indices) if index >= 0]
    if not rows:
        return []
    entries = slot_table[torch.tensor([indices[row] for row in rows], device=slot_table.device)].tolist()
    return [_Slot(row, offset, rank) for row, (offset, rank) in zip(rows, entries, strict=True)]


def _a_matrix(arena: Tensor, slot: _Slot, group: LoraGroup) -> Tensor:
    """The A of every slice of ``group`` as one ``(slices * rank, in_features)`` fp32 matrix."""
    start, rows = slot.offset + slot.rank * group.a_unit(0), group.slices * slot.rank
    return _aligned(arena[start : start + rows * group.in_features]).view(rows, group.in_features)


def _b_matrices(arena: Tensor, slot: _Slot, group: LoraGroup) -> Iterator[tuple[int, slice, Tensor]]:
    """For each slice: its index, its output columns and its B as an ``(out_features, rank)`` fp32 matrix."""
    for index, width in enumerate(group.out_features):
        start, first = slot.offset + slot.rank * group.b_unit(index), group.out_start(index)
        weight = _aligned(arena[start : start + width * slot.rank]).view(width, slot.rank)
        yield index, slice(first, first + width), weight


def _put(target: Tensor, delta: Tensor, add: bool) -> None:
    """``target (+)= delta`` with the sum in fp32 and one rounding to the target's dtype."""
    if add:
        target.add_(delta)  # torch adds mixed float dtypes in the wider one
    else:
        target.copy_(delta)


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """``output[i] (+)= lora_b_weights[indices[i]] @ inputs[i]``; see :func:`kernels.bgmv_expand.bgmv_expand`."""
    del override_config  # launch parameters of the Triton kernel
    weights = lora_b_weights.squeeze(1) if lora_b_weights.ndim == 4 else lora_b_weights
    for row, index in enumerate(lora_indices_tensor.tolist()):
        if index >= 0:
            _put(output_tensor[row], torch.mv(_aligned(weights[index]), _aligned(inputs[row])), add_inputs)


def bgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """``output[i] = scaling * lora_a_weights[indices[i]] @ inputs[i]``; see :func:`kernels.bgmv_shrink.bgmv_shrink`."""
    del override_config
    weights = lora_a_weights.squeeze(1) if lora_a_weights.ndim == 4 else lora_a_weights
    for row, index in enumerate(lora_indices_tensor.tolist()):
        if index >= 0:
            output_tensor[row] = torch.mv(_aligned(weights[index]), _aligned(inputs[row])) * scaling


def bgmv_expand_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    add_inputs: bool = True,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """LoRA B of a packed group, one row a token; see :func:`kernels.bgmv_expand.bgmv_expand_slices`."""
    del override_config
    for slot in _live_rows(slot_table, lora_indices):
        for index, columns, weight in _b_matrices(arena, slot, group):
            hidden = _aligned(inputs[index, slot.row, : slot.rank])
            _put(output[slot.row, columns], torch.mv(weight, hidden), add_inputs)


def bgmv_shrink_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """LoRA A of a packed group, one row a token; see :func:`kernels.bgmv_shrink.bgmv_shrink_slices`."""
    del override_config
    for slot in _live_rows(slot_table, lora_indices):
        hidden = torch.mv(_a_matrix(arena, slot, group), _aligned(inputs[slot.row]))
        output[:, slot.row, : slot.rank] = hidden.view(group.slices, slot.rank)


def sgmv_shrink(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    max_segment: int,
) -> None:
    """LoRA A of a packed group over segments of tokens; see :func:`kernels.sgmv.sgmv_shrink`."""
    del max_segment  # bounds the Triton kernel's grid
    starts = segment_starts.tolist()
    for slot in _live_rows(slot_table, lora_indices):
        tokens = slice(starts[slot.row], starts[slot.row + 1])
        hidden = _aligned(inputs[tokens]) @ _a_matrix(arena, slot, group).T
        output[:, tokens, : slot.rank] = hidden.view(-1, group.slices, slot.rank).transpose(0, 1)


def sgmv_expand(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    max_segment: int,
    add_inputs: bool = True,
) -> None:
    """LoRA B of a packed group over segments of tokens; see :func:`kernels.sgmv.sgmv_expand`."""
    del max_segment
    starts = segment_starts.tolist()
    for slot in _live_rows(slot_table, lora_indices):
        tokens = slice(starts[slot.row], starts[slot.row + 1])
        for index, columns, weight in _b_matrices(arena, slot, group):
            hidden = _aligned(inputs[index, tokens, : slot.rank])
            _put(output[tokens, columns], hidden @ weight.T, add_inputs)

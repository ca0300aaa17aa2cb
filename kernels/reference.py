"""Torch twins of the LoRA kernels: the oracle beside each kernel, and what serves CPU tensors.

Each function has the name, signature and result of its Triton twin; arguments are checked by the public function
in the kernel's own module, so these take them as valid. Products and sums are fp32, rounded once to the output.

A row's result is the same bit for bit whatever shares its batch and wherever its adapter lies. CPU BLAS does not
give that for free: a matrix product's rows change with the number of rows beside them, and a matrix-vector product
with the address of its operands modulo 64 bytes (both seen with MKL). So a decode row is its own matrix-vector
product, a prefill segment its own matrix product, and operands are copied where they are not 64-byte aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lora_group import LoraGroup

_ALIGNMENT = 64  # bytes: a cache line and the widest vector register


class _Adapter(NamedTuple):
    """An adapter that the batch uses: where it lies, and the rows or segments that use it."""

    offset: int
    rank: int
    rows: list[int]


def _adapters(slot_table: Tensor, lora_indices: Tensor) -> list[_Adapter]:
    """The adapters in use; only their entries of the table are read."""
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(lora_indices.tolist()):
        if index >= 0:
            rows.setdefault(index, []).append(row)
    if not rows:
        return []
    entries = slot_table[torch.tensor(list(rows), device=slot_table.device)].tolist()
    return [_Adapter(offset, rank, own) for (offset, rank), own in zip(entries, rows.values(), strict=True)]


def _aligned(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32, contiguous and at a 64-byte boundary (torch's CPU allocator gives such memory)."""
    tensor = tensor.float().contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _aligned_rows(tensor: Tensor) -> Tensor:
    """``tensor`` in fp32 with every row (its last dimension) at a 64-byte boundary."""
    step = _ALIGNMENT // 4
    if tensor.dtype == torch.float32 and tensor.data_ptr() % _ALIGNMENT == 0 and tensor.stride(-1) == 1:
        strides = tensor.stride()[:-1]
        if all(stride % step == 0 for stride in strides):
            return tensor
    width = tensor.shape[-1]
    padded = tensor.new_empty((*tensor.shape[:-1], -(-width // step) * step), dtype=torch.float32)
    return padded[..., :width].copy_(tensor)


def _a_matrix(arena: Tensor, adapter: _Adapter, group: LoraGroup) -> Tensor:
    """The A of every slice of ``group`` as one ``(slices * rank, in_features)`` fp32 matrix."""
    start, rows = adapter.offset + adapter.rank * group.a_unit(0), group.slices * adapter.rank
    return _aligned(arena[start : start + rows * group.in_features]).view(rows, group.in_features)


def _b_matrices(arena: Tensor, adapter: _Adapter, group: LoraGroup) -> list[Tensor]:
    """The B of each slice as an ``(out_features, rank)`` fp32 matrix."""
    matrices = []
    for index, width in enumerate(group.out_features):
        start = adapter.offset + adapter.rank * group.b_unit(index)
        matrices.append(_aligned(arena[start : start + width * adapter.rank]).view(width, adapter.rank))
    return matrices


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
    operands_ready: bool = False,
    shared: bool = False,
) -> None:
    """``output[i] (+)= lora_b_weights[indices[i]] @ inputs[i]``; see :func:`kernels.bgmv_expand.bgmv_expand`."""
    del override_config, operands_ready, shared  # of the Triton kernel
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
    operands_ready: bool = False,
    shared: bool = False,
) -> None:
    """``output[i] = scaling * lora_a_weights[indices[i]] @ inputs[i]``; see :func:`kernels.bgmv_shrink.bgmv_shrink`."""
    del override_config, operands_ready, shared
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
    operands_ready: bool = False,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """LoRA B of a packed group, one row a token; see :func:`kernels.bgmv_expand.bgmv_expand_slices`."""
    del operands_ready, override_config  # of the Triton kernel
    inputs, packed = _aligned_rows(sum(inputs[1:], start=inputs[0])), output[:, : group.out_total]
    for adapter in _adapters(slot_table, lora_indices):
        matrices, hidden = _b_matrices(arena, adapter, group), inputs[:, :, : adapter.rank]
        for row in adapter.rows:
            deltas = [torch.mv(matrix, x) for matrix, x in zip(matrices, hidden.select(1, row).unbind(0), strict=True)]
            _put(packed[row], deltas[0] if len(deltas) == 1 else torch.cat(deltas), add_inputs)


def bgmv_shrink_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    operands_ready: bool = False,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """LoRA A of a packed group, one row a token; see :func:`kernels.bgmv_shrink.bgmv_shrink_slices`."""
    del operands_ready, override_config
    inputs = _aligned_rows(inputs)
    share = -(-group.in_features // output.shape[0])
    share += -share % 16  # a part starts on a 64-byte boundary
    for adapter in _adapters(slot_table, lora_indices):
        matrix, own = _a_matrix(arena, adapter, group), output[..., : adapter.rank]
        for split, part in enumerate(matrix.split(share, dim=1)):
            for row in adapter.rows:
                x = inputs[row, split * share : split * share + part.shape[1]]
                own[split, :, row] = torch.mv(part, x).view(group.slices, adapter.rank)


def sgmv_shrink(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    max_segment: int,
    operands_ready: bool = False,
) -> None:
    """LoRA A of a packed group over segments of tokens; see :func:`kernels.sgmv.sgmv_shrink`."""
    del max_segment, operands_ready  # of the Triton kernel
    starts = segment_starts.tolist()
    for adapter in _adapters(slot_table, lora_indices):
        matrix = _a_matrix(arena, adapter, group).T
        for row in adapter.rows:
            tokens = slice(starts[row], starts[row + 1])
            hidden = _aligned(inputs[tokens]) @ matrix
            output[:, tokens, : adapter.rank] = hidden.view(-1, group.slices, adapter.rank).transpose(0, 1)


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
    operands_ready: bool = False,
) -> None:
    """LoRA B of a packed group over segments of tokens; see :func:`kernels.sgmv.sgmv_expand`."""
    del max_segment, operands_ready
    starts = segment_starts.tolist()
    for adapter in _adapters(slot_table, lora_indices):
        matrices = _b_matrices(arena, adapter, group)
        for row in adapter.rows:
            tokens = slice(starts[row], starts[row + 1])
            hidden = inputs[:, tokens, : adapter.rank].unbind(0)
            deltas = [_aligned(x) @ matrix.T for matrix, x in zip(matrices, hidden, strict=True)]
            _put(output[tokens, : group.out_total], torch.cat(deltas, dim=1), add_inputs)

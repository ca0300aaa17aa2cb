"""LoRA A and B for prefill: tokens grouped into segments, each segment with its own adapter.

After Punica's SGMV (Chen et al. 2023, arXiv 2310.18547): tiles of tokens on the tensor cores, fp32 accumulation, one
launch for all slices of a packed projection group. Tokens outside every segment and segments of index -1 are
neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import interpreter_on, jit, launchable, tl, triton, use_triton
from kernels.lora_checks import (
    FLOATS,
    INTEGERS,
    check_arena,
    check_indices,
    check_output,
    check_rows,
    check_segments,
    check_tensor,
)
from kernels.lora_group import LoraGroup
from kernels.lora_tiles import locate_tile
from kernels.op_configs import get_lora_op_configs

__all__ = ["sgmv_expand", "sgmv_shrink"]


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
    """``output[s, t, :rank] = A[lora_indices[i], s] @ inputs[t]`` for each slice s and each token t of segment i.

    Only the adapter's own rank columns are written. Launches without a host synchronisation.

    Args:
        inputs: (tokens, group.in_features) fp16|bf16|fp32; row stride free.
        arena: (elements,) fp16|bf16|fp32, packed adapters.
        slot_table: (slots, 2) int64, element offset and rank of each slot.
        output: (slices, tokens, max_rank) fp32; max_rank is at least every slot's rank.
        segment_starts: (segments + 1,) int32|int64, non-decreasing token numbers: segment i is
            ``segment_starts[i] ... segment_starts[i + 1]``. The first may lie past 0, the last before ``tokens``.
        lora_indices: (segments,) int32|int64 slot numbers; -1 leaves the segment untouched.
        group: the layout of the group inside an adapter.
        max_segment: at least the longest segment, in tokens; bounds the launch grid.

    Raises:
        ValueError: an argument that does not fit, by name and value (contents are checked on a CPU only).
    """
    torch.ops.lorafleet.sgmv_shrink(
        inputs,
        arena,
        slot_table,
        output,
        segment_starts,
        lora_indices,
        group.unit,
        group.in_features,
        group.out_features,
        max_segment,
    )


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
    """``output[t, c] (+)= B[lora_indices[i], s] @ inputs[s, t, :rank]`` for each slice s and token t of segment i.

    ``c`` are the columns of slice s, ``out_start(s) ... out_start(s) + out_features[s]``.

    Args:
        inputs: (slices, tokens, max_rank) fp32, as :func:`sgmv_shrink` writes it.
        arena, slot_table, segment_starts, lora_indices, group, max_segment: as in :func:`sgmv_shrink`.
        output: (tokens, >= group.out_total) fp16|bf16|fp32, in place; row stride free.
        add_inputs: add to the output; False overwrites it.

    Raises:
        ValueError: an argument that does not fit, by name and value (contents are checked on a CPU only).
    """
    torch.ops.lorafleet.sgmv_expand(
        inputs,
        arena,
        slot_table,
        output,
        segment_starts,
        lora_indices,
        group.unit,
        group.in_features,
        group.out_features,
        max_segment,
        add_inputs,
    )


@jit
def _dot(x, weight, total, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``total + x @ weight`` in fp32; both operands are widened to fp32 where their dtypes differ."""
    if WIDEN:
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, weight, total, input_precision=PRECISION)


@jit(do_not_specialize=["a_unit", "token_tiles"])  # they change with layer and batch: compile once
def _sgmv_shrink_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    a_unit, K, SLICES, token_tiles, x_row_stride, out_slice_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * rank tiles, segments); a group's A is one matrix of slices * rank rows."""
    segment = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(segment_starts_ptr + segment).to(tl.int64)
    first_token = (tl.program_id(0) % token_tiles) * BLOCK_M
    tokens = (tl.load(segment_starts_ptr + segment + 1) - begin).to(tl.int32) - first_token
    rank = tl.load(slot_table_ptr + slot * 2 + 1)
    first = (tl.program_id(0) // token_tiles) * BLOCK_N
    count = (rank * SLICES).to(tl.int32) - first
    if (tokens <= 0) | (count <= 0):
        return

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    token = begin + first_token + m
    weight_start = tl.load(slot_table_ptr + slot * 2) + rank * a_unit + first.to(tl.int64) * K
    x_ptr = input_ptr + token[:, None] * x_row_stride + k[None, :]
    weight_ptr = arena_ptr + weight_start + n[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        left = k < K - done
        x = tl.load(x_ptr + done, mask=(m < tokens)[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_ptr + done, mask=left[:, None] & (n < count)[None, :], other=0.0)
        total = _dot(x, weight, total, WIDEN, PRECISION)

    index = first + n
    column = (index // rank) * out_slice_stride + index % rank
    target = out_ptr + token[:, None] * out_row_stride + column[None, :]
    tl.store(target, total, mask=(m < tokens)[:, None] & (n < count)[None, :])


@jit(do_not_specialize=["b_unit", "token_tiles"])
def _sgmv_expand_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    b_unit, n0, n1, n2, n3, token_tiles, x_slice_stride, x_row_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, ADD_INPUTS: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * column tiles of all slices, segments)."""
    segment = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if slot < 0:
        return
    begin = tl.load(segment_starts_ptr + segment).to(tl.int64)
    first_token = (tl.program_id(0) % token_tiles) * BLOCK_M
    tokens = (tl.load(segment_starts_ptr + segment + 1) - begin).to(tl.int32) - first_token
    if tokens <= 0:
        return
    index, before, first, count = locate_tile(tl.program_id(0) // token_tiles, n0, n1, n2, n3, BLOCK_N)
    rank = tl.load(slot_table_ptr + slot * 2 + 1)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    token = begin + first_token + m
    weight_start = tl.load(slot_table_ptr + slot * 2) + rank * (before + first + b_unit)
    x_ptr = input_ptr + index.to(tl.int64) * x_slice_stride + token[:, None] * x_row_stride + k[None, :]
    weight_ptr = arena_ptr + weight_start + n[None, :] * rank + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, rank.to(tl.int32), BLOCK_K):
        left = k < rank - done
        x = tl.load(x_ptr + done, mask=(m < tokens)[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_ptr + done, mask=left[:, None] & (n < count)[None, :], other=0.0)
        total = _dot(x, weight, total, WIDEN, PRECISION)

    target = out_ptr + token[:, None] * out_row_stride + (before + first + n)[None, :]
    mask = (m < tokens)[:, None] & (n < count)[None, :]
    if ADD_INPUTS:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


_COMMON = "Tensor segment_starts, Tensor lora_indices, int unit, int in_features, int[] out_features, int max_segment"
torch.library.define(
    "lorafleet::sgmv_shrink", f"(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, {_COMMON}) -> ()"
)
torch.library.define(
    "lorafleet::sgmv_expand",
    f"(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, {_COMMON}, bool add_inputs=True) -> ()",
)


@torch.library.register_fake("lorafleet::sgmv_shrink")
def _check_shrink(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: Sequence[int],
    max_segment: int,
) -> None:
    op = "sgmv_shrink"
    group = LoraGroup(unit, in_features, tuple(out_features))
    check_tensor(op, "inputs", inputs, "(tokens, in_features)", FLOATS, inputs)
    check_tensor(op, "output", output, "(slices, tokens, max_rank)", (torch.float32,), inputs)
    check_output(op, "output", output, 1)
    _check_common(op, inputs, arena, slot_table, segment_starts, lora_indices, group, max_segment)
    if inputs.shape[1] != group.in_features:
        raise ValueError(f"{op}: inputs are {inputs.shape[1]} wide but the group takes {group.in_features}; match them")
    if output.shape[0] != group.slices or output.shape[1] != inputs.shape[0]:
        raise ValueError(
            f"{op}: output has shape {tuple(output.shape)}; {group.slices} slices and {inputs.shape[0]} tokens need "
            f"({group.slices}, {inputs.shape[0]}, max_rank)"
        )


@torch.library.register_fake("lorafleet::sgmv_expand")
def _check_expand(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: Sequence[int],
    max_segment: int,
    add_inputs: bool = True,
) -> None:
    op = "sgmv_expand"
    group = LoraGroup(unit, in_features, tuple(out_features))
    check_tensor(op, "inputs", inputs, "(slices, tokens, max_rank)", (torch.float32,), inputs)
    check_tensor(op, "output", output, "(tokens, out_total)", FLOATS, inputs)
    check_output(op, "output", output, 0)
    _check_common(op, inputs, arena, slot_table, segment_starts, lora_indices, group, max_segment)
    if inputs.shape[0] != group.slices:
        raise ValueError(f"{op}: inputs hold {inputs.shape[0]} slices but the group has {group.slices}; match them")
    if output.shape[0] != inputs.shape[1] or output.shape[1] < group.out_total:
        raise ValueError(
            f"{op}: output has shape {tuple(output.shape)}; {inputs.shape[1]} tokens of the group "
            f"{group.out_features} need ({inputs.shape[1]}, >= {group.out_total})"
        )


def _check_common(
    op: str,
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    max_segment: int,
) -> None:
    check_arena(op, arena, slot_table, group, inputs)
    check_tensor(op, "segment_starts", segment_starts, "(segments + 1,)", INTEGERS, inputs)
    check_tensor(op, "lora_indices", lora_indices, "(segments,)", INTEGERS, inputs)
    if segment_starts.shape[0] != lora_indices.shape[0] + 1:
        raise ValueError(
            f"{op}: {segment_starts.shape[0]} segment_starts for {lora_indices.shape[0]} lora_indices; "
            "give one start more than segments"
        )
    check_rows(op, lora_indices.shape[0])
    if max_segment < 0:
        raise ValueError(f"{op}: max_segment is {max_segment}; give the longest segment's tokens")


@torch.library.impl("lorafleet::sgmv_shrink", "default")
def _shrink(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: Sequence[int],
    max_segment: int,
) -> None:
    tensors = (inputs, arena, slot_table, output, segment_starts, lora_indices)
    _check_shrink(*tensors, unit, in_features, out_features, max_segment)
    check_indices("sgmv_shrink", lora_indices, slot_table.shape[0])
    check_segments("sgmv_shrink", segment_starts, inputs.shape[0], max_segment)
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.sgmv_shrink(*tensors, group, max_segment)
        return
    slices, _, max_rank = output.shape
    segments = lora_indices.shape[0]
    if segments == 0 or max_segment == 0:
        return
    # Triton's interpreter multiplies the bit patterns of bf16 operands of a dot.
    widen = inputs.dtype != arena.dtype or (arena.dtype == torch.bfloat16 and interpreter_on())
    launch = get_lora_op_configs("sgmv_shrink", inputs.shape[0], in_features, rank=max_rank)
    if widen or arena.dtype == torch.float32:
        launch["BLOCK_K"] = max(launch["BLOCK_K"] // 2, 16)  # configurations are for 16 bits: keep a step's bytes
    token_tiles = triton.cdiv(max_segment, launch["BLOCK_M"])
    grid = (token_tiles * triton.cdiv(slices * max_rank, launch["BLOCK_N"]), segments)
    with torch.cuda.device_of(inputs):
        launchable(_sgmv_shrink_kernel, inputs)[grid](
            *tensors,
            group.a_unit(0),
            in_features,
            slices,
            token_tiles,
            inputs.stride(0),
            output.stride(0),
            output.stride(1),
            WIDEN=widen,
            PRECISION="ieee",  # matters for fp32 alone
            **launch,
        )


@torch.library.impl("lorafleet::sgmv_expand", "default")
def _expand(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    segment_starts: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: Sequence[int],
    max_segment: int,
    add_inputs: bool = True,
) -> None:
    tensors = (inputs, arena, slot_table, output, segment_starts, lora_indices)
    _check_expand(*tensors, unit, in_features, out_features, max_segment, add_inputs)
    check_indices("sgmv_expand", lora_indices, slot_table.shape[0])
    check_segments("sgmv_expand", segment_starts, inputs.shape[1], max_segment)
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.sgmv_expand(*tensors, group, max_segment, add_inputs)
        return
    segments = lora_indices.shape[0]
    if segments == 0 or max_segment == 0:
        return
    launch = get_lora_op_configs("sgmv_expand", inputs.shape[1], group.out_total, rank=inputs.shape[2])
    token_tiles = triton.cdiv(max_segment, launch["BLOCK_M"])
    column_tiles = sum(triton.cdiv(width, launch["BLOCK_N"]) for width in out_features)
    with torch.cuda.device_of(inputs):
        launchable(_sgmv_expand_kernel, inputs)[(token_tiles * column_tiles, segments)](
            *tensors,
            group.b_unit(0),
            *[*out_features, 0, 0, 0][:4],
            token_tiles,
            inputs.stride(0),
            inputs.stride(1),
            output.stride(0),
            WIDEN=arena.dtype != torch.float32,
            # A 16-bit weight is exact in tf32 and the fp32 input is split in two, so this keeps fp32's accuracy.
            PRECISION="ieee" if arena.dtype == torch.float32 else "tf32x3",
            ADD_INPUTS=add_inputs,
            **launch,
        )

"""LoRA A for decode: one row a token, each row with its own adapter.

After Punica's BGMV (Chen et al. 2023, arXiv 2310.18547). The output is fp32 and overwritten, never accumulated with
atomics, so it is bit-identical from run to run. Rows of index -1 are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, launchable, overlap, tl, triton, use_triton
from kernels.lora_checks import (
    FLOATS,
    INTEGERS,
    check_arena,
    check_indices,
    check_output,
    check_override,
    check_rows,
    check_share,
    check_tensor,
    check_weights,
)
from kernels.lora_group import LoraGroup
from kernels.lora_tiles import leads_its_share, row_products, wait_in_one_program
from kernels.op_configs import POWERS, SHRINK_KEYS, SHRINK_SLICES_KEYS, get_lora_op_configs, packed, unpacked

__all__ = ["bgmv_shrink", "bgmv_shrink_slices"]


def bgmv_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """``output_tensor[i] = scaling * lora_a_weights[lora_indices_tensor[i]] @ inputs[i]``.

    Also ``torch.ops.lorafleet.bgmv_shrink``. Launches without a host synchronisation.

    Args:
        inputs: (batch, in_features) fp16|bf16|fp32; row stride free.
        lora_a_weights: (lora_num, rank, in_features) or (lora_num, 1, rank, in_features) fp16|bf16|fp32; the slot
            stride is free, the last two dimensions contiguous.
        output_tensor: (batch, rank) fp32, overwritten; row stride free.
        lora_indices_tensor: (batch,) int32|int64; -1 leaves the row untouched. Values of lora_num or more are
            refused on a CPU; on a GPU, where that would cost a synchronisation, they must not occur.
        scaling: factor applied to the fp32 sum.
        override_config: any of BLOCK_N (rank rows a program), BLOCK_K (columns a step), num_warps, num_stages.

    Raises:
        ValueError: a shape, dtype, stride, device, index or configuration that does not fit, by name and value.
    """
    check_override("bgmv_shrink", override_config, SHRINK_KEYS, POWERS)
    torch.ops.lorafleet.bgmv_shrink(
        inputs, lora_a_weights, output_tensor, lora_indices_tensor, scaling, packed(SHRINK_KEYS, override_config)
    )


def bgmv_shrink_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    group: LoraGroup,
    share: int = 1,
    operands_ready: bool = False,
    override_config: Mapping[str, int] | None = None,
) -> None:
    """LoRA A of a packed projection group in one launch, adapters of mixed ranks read in place from the arena.

    ``output[:, s, i, :rank].sum(0) = A[lora_indices[i], s] @ inputs[i]`` for each slice s: a long sum is left in
    parts, each over its own columns, which :func:`kernels.bgmv_expand.bgmv_expand_slices` adds up in order. Only the
    adapter's own rank columns are written. May be captured in a CUDA graph.

    Args:
        inputs: (batch, group.in_features) fp16|bf16|fp32; row stride free.
        arena: (elements,) fp16|bf16|fp32, packed adapters.
        slot_table: (slots, 2) int64, element offset and rank of each slot.
        output: (group.splits, slices, batch, max_rank) fp32; max_rank is at least every slot's
            rank.
        lora_indices: (batch,) int32|int64 slot numbers; -1 leaves the row untouched.
        group: the layout of the group inside an adapter.
        share: rows ``n * share`` to ``(n + 1) * share`` that have one adapter read it once; a power of two. The
            result is the same bit for bit, and distinct rows are served fastest by 1.
        operands_ready: no kernel that may still be running when this one is launched writes ``arena``, ``slot_table``
            or ``lora_indices``. A GPU of compute capability 9.0 or later then loads weights while the kernel before
            this one in the stream finishes.
        override_config: BLOCK_N (rank rows a program).

    Raises:
        ValueError: a shape, dtype, stride, device, index or configuration that does not fit, by name and value.
    """
    check_override("bgmv_shrink_slices", override_config, SHRINK_SLICES_KEYS, POWERS)
    torch.ops.lorafleet.bgmv_shrink_slices(
        inputs,
        arena,
        slot_table,
        output,
        lora_indices,
        group.unit,
        group.in_features,
        group.out_features,
        share,
        operands_ready,
        packed(SHRINK_SLICES_KEYS, override_config),
    )


@jit
def _bgmv_shrink_kernel(
    input_ptr, lora_ptr, out_ptr, N, K, lora_indices, scaling, xm_stride, l0_stride, cm_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rank, batch); N is the rank, K the input width."""
    if WAIT == "first":
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices + row).to(tl.int64)
    if slot < 0:
        return
    first = tl.program_id(0) * BLOCK_N
    weight_ptr = lora_ptr + slot * l0_stride + first.to(tl.int64) * K
    products = row_products(input_ptr + row * xm_stride, weight_ptr, N - first, K, K, BLOCK_N, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    tl.store(out_ptr + row * cm_stride + first + n, tl.sum(products, 1) * scaling, mask=n < N - first)


@jit
def _shrink_tile(
    x_ptr, weight_ptr, out_ptr, slot_ptr, slot, others, first, rows, columns, K, rank,
    x_row_stride, out_slice_stride, out_row_stride,
    SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Sums of ``rows`` rows of a group's A, from row ``first`` on, over ``columns`` columns of an input.

    With SHARE, also those of the inputs among the ``others`` after it that have the same slot.
    """
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = k < columns
    weight = tl.load(weight_ptr + n[:, None].to(tl.int64) * K + k, mask=(n < rows)[:, None] & inside, other=0.0)
    if WAIT == "late":
        gdc_wait()
    weight = weight.to(tl.float32)
    x = tl.load(x_ptr + k, mask=inside, other=0.0)
    index = first + n
    target = out_ptr + (index // rank) * out_slice_stride + index % rank
    if SHARE == 1:
        tl.store(target, tl.sum(weight * x.to(tl.float32), 1), mask=n < rows)
    else:
        live = others >= 0  # the first row, always
        for other in range(1, others + 2):  # an input is under way while the one before it is summed
            same = tl.load(slot_ptr + other, mask=other <= others, other=-1) == slot
            x_ptr += x_row_stride
            following = tl.load(x_ptr + k, mask=inside & same, other=0.0)
            if live:
                tl.store(target, tl.sum(weight * x.to(tl.float32), 1), mask=n < rows)
            x = following
            live = same
            target += out_row_stride


@jit(do_not_specialize=["a_unit"])  # it changes with the layer: compile once
def _bgmv_shrink_slices_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, lora_indices_ptr,
    a_unit, K, SLICES, x_row_stride, out_split_stride, out_slice_stride, out_row_stride,
    SHARE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of slices * max_rank times SPLITS, batch): a group's A is one matrix of slices * rank rows."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * BLOCK_N
    row = tl.program_id(1)
    slot = tl.load(lora_indices_ptr + row)
    idle = slot < 0
    if SHARE > 1:
        idle = idle | (not leads_its_share(lora_indices_ptr, row, slot, SHARE))
    if idle:
        wait_in_one_program(WAIT)
        return
    others = tl.minimum(SHARE - row % SHARE, tl.num_programs(1) - row) - 1
    entry = slot_table_ptr + slot.to(tl.int64) * 2
    rank = tl.load(entry + 1)
    rows = (rank * SLICES).to(tl.int32) - first
    if rows <= 0:
        wait_in_one_program(WAIT)
        return
    share = tl.cdiv(tl.cdiv(K, SPLITS), 16) * 16
    begin = split * share
    columns = tl.minimum(share, K - begin)
    start = tl.load(entry) + rank * a_unit + first.to(tl.int64) * K
    x_ptr = input_ptr + row.to(tl.int64) * x_row_stride + begin
    target_ptr = out_ptr + split * out_split_stride + row.to(tl.int64) * out_row_stride
    slot_ptr = lora_indices_ptr + row
    if start % 8 == 0:  # written so that the compiler sees it and loads whole vectors
        _shrink_tile(
            x_ptr, arena_ptr + start // 8 * 8 + begin, target_ptr, slot_ptr, slot, others, first, rows, columns, K,
            rank, x_row_stride, out_slice_stride, out_row_stride, SHARE, BLOCK_N, BLOCK_K, WAIT,
        )  # fmt: skip
    else:
        _shrink_tile(
            x_ptr, arena_ptr + start + begin, target_ptr, slot_ptr, slot, others, first, rows, columns, K,
            rank, x_row_stride, out_slice_stride, out_row_stride, SHARE, BLOCK_N, BLOCK_K, WAIT,
        )  # fmt: skip


torch.library.define(
    "lorafleet::bgmv_shrink",
    "(Tensor inputs, Tensor lora_a_weights, Tensor(a!) output_tensor, Tensor lora_indices_tensor, "
    "float scaling=1.0, int[]? config=None) -> ()",
)
torch.library.define(
    "lorafleet::bgmv_shrink_slices",
    "(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, Tensor lora_indices, int unit, "
    "int in_features, int[] out_features, int share=1, bool operands_ready=False, int[]? config=None) -> ()",
)


@torch.library.register_fake("lorafleet::bgmv_shrink")
def _check_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
    config: list[int] | None = None,
) -> None:
    op = "bgmv_shrink"
    check_tensor(op, "inputs", inputs, "(batch, in_features)", FLOATS, inputs)
    weights = check_weights(op, "lora_a_weights", lora_a_weights, "(lora_num, rank, in_features)", FLOATS, inputs)
    check_tensor(op, "output_tensor", output_tensor, "(batch, rank)", (torch.float32,), inputs)
    check_tensor(op, "lora_indices_tensor", lora_indices_tensor, "(batch,)", INTEGERS, inputs)
    check_output(op, "output_tensor", output_tensor, 0)
    rank, width = weights.shape[1:]
    if inputs.shape[1] != width:
        raise ValueError(f"{op}: inputs are {inputs.shape[1]} wide but lora_a_weights take {width}; match them")
    if output_tensor.shape[1] != rank:
        raise ValueError(f"{op}: output_tensor is {output_tensor.shape[1]} wide but the rank is {rank}; match them")
    check_rows(
        op, inputs.shape[0], output_tensor=output_tensor.shape[0], lora_indices_tensor=lora_indices_tensor.shape[0]
    )


@torch.library.register_fake("lorafleet::bgmv_shrink_slices")
def _check_shrink_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: list[int],
    share: int = 1,
    operands_ready: bool = False,
    config: list[int] | None = None,
) -> None:
    op = "bgmv_shrink_slices"
    group = LoraGroup(unit, in_features, tuple(out_features))
    check_tensor(op, "inputs", inputs, "(batch, in_features)", FLOATS, inputs)
    check_arena(op, arena, slot_table, group, inputs)
    check_tensor(op, "output", output, "(splits, slices, batch, max_rank)", (torch.float32,), inputs)
    check_tensor(op, "lora_indices", lora_indices, "(batch,)", INTEGERS, inputs)
    check_output(op, "output", output, 2)
    check_share(op, share)
    if inputs.shape[1] != group.in_features:
        raise ValueError(f"{op}: inputs are {inputs.shape[1]} wide but the group takes {group.in_features}; match them")
    if output.shape[0] != group.splits:
        raise ValueError(
            f"{op}: output holds {output.shape[0]} splits but an input {in_features} wide makes {group.splits}; "
            "give it LoraGroup.splits"
        )
    if output.shape[1] != group.slices:
        raise ValueError(f"{op}: output holds {output.shape[1]} slices but the group has {group.slices}; match them")
    check_rows(op, inputs.shape[0], output=output.shape[2], lora_indices=lora_indices.shape[0])


@torch.library.impl("lorafleet::bgmv_shrink", "default")
def _shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
    config: list[int] | None = None,
) -> None:
    _check_shrink(inputs, lora_a_weights, output_tensor, lora_indices_tensor, scaling, config)
    weights = lora_a_weights.squeeze(1) if lora_a_weights.ndim == 4 else lora_a_weights
    check_indices("bgmv_shrink", lora_indices_tensor, weights.shape[0])
    if not use_triton(inputs):
        reference.bgmv_shrink(inputs, weights, output_tensor, lora_indices_tensor, scaling)
        return
    batch, width = inputs.shape
    if batch == 0:
        return
    rank = weights.shape[1]
    launch = get_lora_op_configs("shrink", batch, width, rank=rank) | unpacked(SHRINK_KEYS, config)
    with torch.cuda.device_of(inputs):
        launchable(_bgmv_shrink_kernel, inputs)[(triton.cdiv(rank, launch["BLOCK_N"]), batch)](
            inputs,
            weights,
            output_tensor,
            rank,
            width,
            lora_indices_tensor,
            scaling,
            inputs.stride(0),
            weights.stride(0),
            output_tensor.stride(0),
            **overlap(inputs),
            **launch,
        )


@torch.library.impl("lorafleet::bgmv_shrink_slices", "default")
def _shrink_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: list[int],
    share: int = 1,
    operands_ready: bool = False,
    config: list[int] | None = None,
) -> None:
    _check_shrink_slices(inputs, arena, slot_table, output, lora_indices, unit, in_features, out_features, share)
    check_indices("bgmv_shrink_slices", lora_indices, slot_table.shape[0])
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.bgmv_shrink_slices(inputs, arena, slot_table, output, lora_indices, group)
        return
    splits, slices, batch, max_rank = output.shape
    if batch == 0:
        return
    launch = get_lora_op_configs("shrink_slices", batch, in_features, rank=max_rank)
    launch |= unpacked(SHRINK_SLICES_KEYS, config)
    # Whole warps along a row, whatever BLOCK_N: the order of a row's sum is a function of its width alone.
    width = triton.next_power_of_2(triton.cdiv(triton.cdiv(in_features, splits), 16) * 16)
    with torch.cuda.device_of(inputs):
        launchable(_bgmv_shrink_slices_kernel, inputs)[
            (triton.cdiv(slices * max_rank, launch["BLOCK_N"]) * splits, batch)
        ](
            inputs,
            arena,
            slot_table,
            output,
            lora_indices,
            group.a_unit(0),
            in_features,
            slices,
            inputs.stride(0),
            *output.stride()[:3],
            SHARE=share,
            SPLITS=splits,
            BLOCK_K=width,
            num_warps=min(max(width // 256, 1), 8),
            **overlap(inputs, operands_ready),
            **launch,
        )

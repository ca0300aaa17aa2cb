"""LoRA B for decode: one row a token, each row with its own adapter.

After Punica's BGMV (Chen et al. 2023, arXiv 2310.18547) with the call that LoRAX exposes. Products and sums are
fp32 and rounded once to the output's dtype. Rows of index -1 are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, launchable, overlap, tl, triton, use_triton
from kernels.lora_checks import (
    FLOATS,
    HALVES,
    INTEGERS,
    check_arena,
    check_indices,
    check_output,
    check_override,
    check_rows,
    check_slots,
    check_tensor,
    check_weights,
)
from kernels.lora_group import LoraGroup
from kernels.lora_tiles import has_slot, locate_tile, next_slot, wait_in_one_program
from kernels.op_configs import EXPAND_KEYS, EXPAND_SLICES_KEYS, POWERS, get_lora_op_configs, packed, unpacked

__all__ = ["bgmv_expand", "bgmv_expand_slices", "get_lora_op_configs"]


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
    """``output_tensor[i] (+)= lora_b_weights[lora_indices_tensor[i]] @ inputs[i]``, in place.

    Also ``torch.ops.lorafleet.bgmv_expand``, which torch.compile sees as one operation. Launches without a host
    synchronisation, so it may be captured in a CUDA graph.

    Args:
        inputs: (batch, rank) fp16|bf16|fp32; row stride free.
        lora_b_weights: (lora_num, hidden, rank) or (lora_num, 1, hidden, rank) fp16|bf16; the slot stride is free,
            the last two dimensions contiguous. Any rank >= 1 and any hidden >= 1.
        output_tensor: (batch, hidden) fp16|bf16|fp32; row stride free.
        lora_indices_tensor: (batch,) int32|int64; -1 leaves the row of the output untouched. Values of lora_num or
            more are refused on a CPU; on a GPU, where that would cost a synchronisation, they must not occur.
        add_inputs: add to the output; False overwrites it.
        override_config: any of BLOCK_N, SPLIT_N (programs over hidden; need not divide it), num_warps, num_stages;
            what is absent comes from :func:`get_lora_op_configs`.
        operands_ready: no kernel that may still be running when this one is launched writes ``lora_b_weights`` or
            ``lora_indices_tensor``. A GPU of compute capability 9.0 or later then loads weights while the kernel before
            this one in the stream finishes.
        shared: most adapters have two or more rows, side by side. A few neighbouring rows are then served by one
            program, which reads an adapter once for all that have it; rows that do not share are slower.

    Raises:
        ValueError: a shape, dtype, stride, device, index or configuration that does not fit, by name and value.
    """
    check_override("bgmv_expand", override_config, EXPAND_KEYS, POWERS)
    torch.ops.lorafleet.bgmv_expand(
        inputs,
        lora_b_weights,
        output_tensor,
        lora_indices_tensor,
        add_inputs,
        packed(EXPAND_KEYS, override_config),
        operands_ready,
        shared,
    )


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
    """LoRA B of a packed projection group in one launch, adapters of mixed ranks read in place from the arena.

    For slice s of the group, with columns ``c = out_start(s) ... out_start(s) + out_features[s]``:
    ``output[i, c] (+)= B[lora_indices[i], s] @ inputs[:, s, i, :rank].sum(0)``. Each adapter's offset and rank come
    from ``slot_table`` on the device; nothing beyond its own rank is read. May be captured in a CUDA graph.

    Args:
        inputs: (splits, slices, batch, max_rank) fp32, as ``bgmv_shrink_slices`` writes it: partial sums.
        arena: (elements,) fp16|bf16|fp32, packed adapters.
        slot_table: (slots, 2) int64, element offset and rank of each slot.
        output: (batch, >= group.out_total) fp16|bf16|fp32; row stride free; further columns are untouched.
        lora_indices: (batch,) int32|int64 slot numbers; -1 leaves the row untouched.
        group: the layout of the group inside an adapter.
        add_inputs: add to the output; False overwrites it.
        operands_ready: as in :func:`kernels.bgmv_shrink.bgmv_shrink_slices`; ``inputs`` need not be ready.
        override_config: any of BLOCK_N, BLOCK_K (rank step), num_warps, num_stages.

    Raises:
        ValueError: a shape, dtype, stride, device, index or configuration that does not fit, by name and value.
    """
    check_override("bgmv_expand_slices", override_config, EXPAND_SLICES_KEYS, POWERS)
    torch.ops.lorafleet.bgmv_expand_slices(
        inputs,
        arena,
        slot_table,
        output,
        lora_indices,
        group.unit,
        group.in_features,
        group.out_features,
        add_inputs,
        operands_ready,
        packed(EXPAND_SLICES_KEYS, override_config),
    )


# --- kernels


@jit
def _expand_slot(
    input_ptr, lora_ptr, out_ptr, lora_indices_ptr, slot, row, batch, count, K,
    xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, ADD_INPUTS: tl.constexpr,
    CAST_TYPE: tl.constexpr, VECTORS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """``count`` rows of B of ``slot`` for each of the ROWS rows that has it; none for -1."""
    if slot >= 0:
        n = tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        place = lora_ptr + n[:, None].to(tl.int64) * lora_k_stride + k * lora_n_stride
        weight = _load_rows(place, n < count, k < K, EVEN_K)
        if WAIT == "late":
            gdc_wait()
        mine = ()
        xs = ()
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            mine += (has_slot(lora_indices_ptr, row, other, batch, slot, ROWS),)
            x = tl.load(input_ptr + other * xm_stride + k * xk_stride, mask=(k < K) & mine[other], other=0.0)
            if not CAST_TYPE:  # the product of two 16-bit floats is exact in fp32
                x = x.to(tl.float32)
            xs += (x,)
        for done in range(0, count, BLOCK_N):
            target = out_ptr + (done + n).to(tl.int64) * cn_stride
            inside = n < count - done
            values = ()
            for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
                if ADD_INPUTS:  # before the products, so that the load is under way meanwhile
                    old = tl.load(target + other * cm_stride, mask=inside & mine[other], other=0.0).to(tl.float32)
                else:
                    old = tl.zeros((BLOCK_N,), dtype=tl.float32)
                values += (old,)
            wide = weight.to(tl.float32)
            place += BLOCK_N * lora_k_stride
            weight = _load_rows(place, n < count - done - BLOCK_N, k < K, EVEN_K)
            for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
                products = wide * xs[other]
                if not VECTORS:
                    # Where a thread has one product, it would fuse that, unrounded, into the sum with its neighbours'
                    # rounded ones, and two threads that hold one sum would differ in its last bit.
                    products += 0.0
                total = values[other] + tl.sum(products, 1)
                tl.store(target + other * cm_stride, total.to(out_ptr.dtype.element_ty), mask=inside & mine[other])


@jit(do_not_specialize=["batch"])
def _bgmv_expand_kernel(
    input_ptr, lora_ptr, out_ptr, batch, N, K, lora_indices,
    xm_stride, xk_stride, l0_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_N: tl.constexpr,
    EVEN_K: tl.constexpr, ADD_INPUTS: tl.constexpr, CAST_TYPE: tl.constexpr,
    VECTORS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (SPLIT_N, batch / ROWS). ``lora_k_stride`` steps along hidden and ``lora_n_stride`` along rank, as in LoRAX.

    VECTORS: every row of every adapter starts at a multiple of 16 bytes.
    """
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64) * ROWS
    if VECTORS:  # written so that the compiler sees it
        l0_stride = l0_stride // 8 * 8
        lora_k_stride = lora_k_stride // 8 * 8
    share = tl.cdiv(tl.cdiv(N, SPLIT_N), 16) * 16  # whole vectors, so that stores stay aligned
    start = tl.program_id(0) * share
    count = tl.minimum(N - start, share)  # negative where the shares before cover all of N
    input_ptr += row * xm_stride
    lora_ptr += start.to(tl.int64) * lora_k_stride
    out_ptr += row * cm_stride + start.to(tl.int64) * cn_stride
    if ROWS == 1:
        slot = tl.load(lora_indices + row).to(tl.int64)
        _expand_slot(
            input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K,
            xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
            ROWS, BLOCK_N, BLOCK_K, EVEN_K, ADD_INPUTS, CAST_TYPE, VECTORS, WAIT,
        )  # fmt: skip
    else:
        for turn in range(ROWS):
            slot = next_slot(lora_indices, row, turn, batch, ROWS)
            _expand_slot(
                input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K,
                xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
                ROWS, BLOCK_N, BLOCK_K, EVEN_K, ADD_INPUTS, CAST_TYPE, VECTORS, WAIT,
            )  # fmt: skip
    wait_in_one_program(WAIT)


@jit
def _load_rows(place, rows, columns, EVEN_K: tl.constexpr):
    """A tile of weights, zero where ``rows`` or, unless EVEN_K, ``columns`` is false."""
    if EVEN_K:
        return tl.load(place, mask=rows[:, None], other=0.0)
    return tl.load(place, mask=rows[:, None] & columns, other=0.0)


@jit
def _sum_splits(ptr, mask, split_stride, SPLITS: tl.constexpr):
    """The partial sums of the shrink, added in order."""
    total = tl.load(ptr, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(ptr + split * split_stride, mask=mask, other=0.0)
    return total


@jit(do_not_specialize=["b_unit"])  # it changes with the layer: compile once
def _bgmv_expand_slices_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, lora_indices_ptr,
    b_unit, n0, n1, n2, n3, x_split_stride, x_slice_stride, x_row_stride, out_row_stride,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADD_INPUTS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all slices, batch): a narrow slice has only its own tiles."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices_ptr + row).to(tl.int64)
    if slot < 0:
        wait_in_one_program(WAIT)
        return
    offset = tl.load(slot_table_ptr + slot * 2)
    # Multiples of 8 as they are (packed_rank), written so that the compiler sees it and loads whole vectors.
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32) // 8 * 8
    index, before, first, rows = locate_tile(tl.program_id(0), n0, n1, n2, n3, BLOCK_N)
    start = (offset + rank.to(tl.int64) * (before + first + b_unit)) // 8 * 8
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < rows
    place = arena_ptr + start + n[:, None] * rank + k
    weight = tl.load(place, mask=inside[:, None] & (k < rank), other=0.0)
    if WAIT == "late":
        gdc_wait()
    target = out_ptr + row * out_row_stride + (before + first) + n
    if ADD_INPUTS:  # before the products, so that the load is under way meanwhile
        values = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.zeros((BLOCK_N,), dtype=tl.float32)
    x_ptr = input_ptr + index.to(tl.int64) * x_slice_stride + row * x_row_stride + k
    values += tl.sum(weight.to(tl.float32) * _sum_splits(x_ptr, k < rank, x_split_stride, SPLITS), 1)
    for step in range(BLOCK_K, rank, BLOCK_K):
        left = step + k < rank
        weight = tl.load(place + step, mask=inside[:, None] & left, other=0.0)
        values += tl.sum(weight.to(tl.float32) * _sum_splits(x_ptr + step, left, x_split_stride, SPLITS), 1)
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)


# --- torch.library registration

torch.library.define(
    "lorafleet::bgmv_expand",
    "(Tensor inputs, Tensor lora_b_weights, Tensor(a!) output_tensor, Tensor lora_indices_tensor, "
    "bool add_inputs=True, int[]? config=None, bool operands_ready=False, bool shared=False) -> ()",
)
torch.library.define(
    "lorafleet::bgmv_expand_slices",
    "(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, Tensor lora_indices, int unit, "
    "int in_features, int[] out_features, bool add_inputs=True, bool operands_ready=False, "
    "int[]? config=None) -> ()",
)


@torch.library.register_fake("lorafleet::bgmv_expand")
def _check_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
    config: list[int] | None = None,
    operands_ready: bool = False,
    shared: bool = False,
) -> None:
    op = "bgmv_expand"
    check_tensor(op, "inputs", inputs, "(batch, rank)", FLOATS, inputs)
    weights = check_weights(op, "lora_b_weights", lora_b_weights, "(lora_num, hidden, rank)", HALVES, inputs)
    check_tensor(op, "output_tensor", output_tensor, "(batch, hidden)", FLOATS, inputs)
    check_tensor(op, "lora_indices_tensor", lora_indices_tensor, "(batch,)", INTEGERS, inputs)
    check_output(op, "output_tensor", output_tensor, 0)
    hidden, rank = weights.shape[1:]
    if inputs.shape[1] != rank:
        raise ValueError(f"{op}: inputs are {inputs.shape[1]} wide but lora_b_weights have rank {rank}; match them")
    if output_tensor.shape[1] != hidden:
        raise ValueError(
            f"{op}: output_tensor is {output_tensor.shape[1]} wide but lora_b_weights have {hidden} rows; "
            "pass a view of exactly that width"
        )
    check_rows(
        op, inputs.shape[0], output_tensor=output_tensor.shape[0], lora_indices_tensor=lora_indices_tensor.shape[0]
    )


@torch.library.register_fake("lorafleet::bgmv_expand_slices")
def _check_expand_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: list[int],
    add_inputs: bool = True,
    operands_ready: bool = False,
    config: list[int] | None = None,
) -> None:
    op = "bgmv_expand_slices"
    group = LoraGroup(unit, in_features, tuple(out_features))
    check_tensor(op, "inputs", inputs, "(splits, slices, batch, max_rank)", (torch.float32,), inputs)
    check_arena(op, arena, slot_table, group, inputs)
    check_tensor(op, "output", output, "(batch, out_total)", FLOATS, inputs)
    check_tensor(op, "lora_indices", lora_indices, "(batch,)", INTEGERS, inputs)
    check_output(op, "output", output, 0)
    if inputs.shape[1] != group.slices:
        raise ValueError(f"{op}: inputs hold {inputs.shape[1]} slices but the group has {group.slices}; match them")
    if output.shape[1] < group.out_total:
        raise ValueError(f"{op}: output is {output.shape[1]} wide; the group {group.out_features} needs more")
    check_rows(op, inputs.shape[2], output=output.shape[0], lora_indices=lora_indices.shape[0])


@torch.library.impl("lorafleet::bgmv_expand", "default")
def _expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
    config: list[int] | None = None,
    operands_ready: bool = False,
    shared: bool = False,
) -> None:
    _check_expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor)
    weights = lora_b_weights.squeeze(1) if lora_b_weights.ndim == 4 else lora_b_weights
    check_indices("bgmv_expand", lora_indices_tensor, weights.shape[0])
    if not use_triton(inputs):
        reference.bgmv_expand(inputs, weights, output_tensor, lora_indices_tensor, add_inputs)
        return
    batch = inputs.shape[0]
    if batch == 0:
        return
    hidden, rank = weights.shape[1:]
    launch = get_lora_op_configs("expand_shared" if shared else "expand", batch, hidden, rank=rank)
    launch = {"ROWS": 1} | launch | unpacked(EXPAND_KEYS, config)
    block_k = triton.next_power_of_2(rank)
    with torch.cuda.device_of(inputs):
        launchable(_bgmv_expand_kernel, inputs)[(launch["SPLIT_N"], triton.cdiv(batch, launch["ROWS"]))](
            inputs,
            weights,
            output_tensor,
            batch,
            hidden,
            rank,
            lora_indices_tensor,
            *inputs.stride(),
            *weights.stride(),
            *output_tensor.stride(),
            BLOCK_K=block_k,
            EVEN_K=rank == block_k,
            ADD_INPUTS=add_inputs,
            CAST_TYPE=inputs.dtype == torch.float32,
            VECTORS=rank % 8 == 0 and weights.stride(0) % 8 == 0 and weights.data_ptr() % 16 == 0,
            **overlap(inputs, operands_ready),
            **launch,
        )


@torch.library.impl("lorafleet::bgmv_expand_slices", "default")
def _expand_slices(
    inputs: Tensor,
    arena: Tensor,
    slot_table: Tensor,
    output: Tensor,
    lora_indices: Tensor,
    unit: int,
    in_features: int,
    out_features: list[int],
    add_inputs: bool = True,
    operands_ready: bool = False,
    config: list[int] | None = None,
) -> None:
    _check_expand_slices(inputs, arena, slot_table, output, lora_indices, unit, in_features, out_features, add_inputs)
    check_indices("bgmv_expand_slices", lora_indices, slot_table.shape[0])
    check_slots("bgmv_expand_slices", slot_table)
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.bgmv_expand_slices(inputs, arena, slot_table, output, lora_indices, group, add_inputs)
        return
    splits, _, batch, max_rank = inputs.shape
    if batch == 0:
        return
    launch = get_lora_op_configs("expand_slices", batch, group.out_total, rank=max_rank)
    launch |= unpacked(EXPAND_SLICES_KEYS, config)
    tiles = sum(triton.cdiv(width, launch["BLOCK_N"]) for width in out_features)
    widths = [*out_features, 0, 0, 0][:4]
    with torch.cuda.device_of(inputs):
        launchable(_bgmv_expand_slices_kernel, inputs)[(tiles, batch)](
            inputs,
            arena,
            slot_table,
            output,
            lora_indices,
            group.b_unit(0),
            *widths,
            *inputs.stride()[:3],
            output.stride(0),
            SPLITS=splits,
            ADD_INPUTS=add_inputs,
            **overlap(inputs, operands_ready),
            **launch,
        )

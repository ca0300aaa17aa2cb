"""LoRA B for decode: one row a token, each row with its own adapter.

After Punica's BGMV (Chen et al. 2023, arXiv 2310.18547) with the call that LoRAX exposes. Products and sums are
fp32 and rounded once to the output's dtype. Rows of index -1 are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import reference
from kernels.bgmv_expand_kernels import expand_kernel, expand_slices_kernel
from kernels.dispatch import launchable, overlap, triton, use_triton
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
        launchable(expand_kernel, inputs)[(launch["SPLIT_N"], triton.cdiv(batch, launch["ROWS"]))](
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
        launchable(expand_slices_kernel, inputs)[(tiles, batch)](
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

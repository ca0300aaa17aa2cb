"""LoRA A for decode: one row a token, each row with its own adapter.

After Punica's BGMV (Chen et al. 2023, arXiv 2310.18547). The output is fp32 and overwritten, never accumulated with
atomics, so it is bit-identical from run to run. Rows of index -1 are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import reference
from kernels.bgmv_shrink_kernels import shrink_kernel, shrink_slices_kernel
from kernels.dispatch import launchable, overlap, triton, use_triton
from kernels.lora_checks import (
    FLOATS,
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
from kernels.op_configs import POWERS, SHRINK_KEYS, SHRINK_SLICES_KEYS, get_lora_op_configs, packed, unpacked

__all__ = ["bgmv_shrink", "bgmv_shrink_slices"]


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
        override_config: any of BLOCK_N (rank rows a step), SPLIT_N (programs over the rank; need not divide it; it may
            have more than one step each where BLOCK_K covers the input), BLOCK_K (columns a step), num_warps,
            num_stages.
        operands_ready: no kernel that may still be running when this one is launched writes ``lora_a_weights`` or
            ``lora_indices_tensor``. A GPU of compute capability 9.0 or later then loads weights while the kernel before
            this one in the stream finishes.
        shared: as in :func:`kernels.bgmv_expand.bgmv_expand`.

    Raises:
        ValueError: a shape, dtype, stride, device, index or configuration that does not fit, by name and value.
    """
    check_override("bgmv_shrink", override_config, SHRINK_KEYS, POWERS)
    torch.ops.lorafleet.bgmv_shrink(
        inputs,
        lora_a_weights,
        output_tensor,
        lora_indices_tensor,
        scaling,
        packed(SHRINK_KEYS, override_config),
        operands_ready,
        shared,
    )


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
        operands_ready,
        packed(SHRINK_SLICES_KEYS, override_config),
    )


torch.library.define(
    "lorafleet::bgmv_shrink",
    "(Tensor inputs, Tensor lora_a_weights, Tensor(a!) output_tensor, Tensor lora_indices_tensor, "
    "float scaling=1.0, int[]? config=None, bool operands_ready=False, bool shared=False) -> ()",
)
torch.library.define(
    "lorafleet::bgmv_shrink_slices",
    "(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, Tensor lora_indices, int unit, "
    "int in_features, int[] out_features, bool operands_ready=False, int[]? config=None) -> ()",
)


@torch.library.register_fake("lorafleet::bgmv_shrink")
def _check_shrink(
    inputs: Tensor,
    lora_a_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
    config: list[int] | None = None,
    operands_ready: bool = False,
    shared: bool = False,
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
    operands_ready: bool = False,
    shared: bool = False,
) -> None:
    _check_shrink(inputs, lora_a_weights, output_tensor, lora_indices_tensor)
    weights = lora_a_weights.squeeze(1) if lora_a_weights.ndim == 4 else lora_a_weights
    check_indices("bgmv_shrink", lora_indices_tensor, weights.shape[0])
    if not use_triton(inputs):
        reference.bgmv_shrink(inputs, weights, output_tensor, lora_indices_tensor, scaling)
        return
    batch, width = inputs.shape
    if batch == 0:
        return
    rank = weights.shape[1]
    launch = get_lora_op_configs("shrink_shared" if shared else "shrink", batch, width, rank=rank)
    launch = {"ROWS": 1} | launch | unpacked(SHRINK_KEYS, config)
    one_step = launch["BLOCK_K"] >= width
    tiles = -(-rank // launch["BLOCK_N"])
    programs = launch.get("SPLIT_N", tiles) if one_step else tiles  # along K a program has one tile
    launch["SPLIT_N"] = programs
    with torch.cuda.device_of(inputs):
        launchable(shrink_kernel, inputs)[(programs, triton.cdiv(batch, launch["ROWS"]))](
            inputs,
            weights,
            output_tensor,
            batch,
            rank,
            width,
            lora_indices_tensor,
            scaling,
            inputs.stride(0),
            weights.stride(0),
            output_tensor.stride(0),
            ONE_STEP=one_step,
            **overlap(inputs, operands_ready),
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
    operands_ready: bool = False,
    config: list[int] | None = None,
) -> None:
    _check_shrink_slices(inputs, arena, slot_table, output, lora_indices, unit, in_features, out_features)
    check_indices("bgmv_shrink_slices", lora_indices, slot_table.shape[0])
    check_slots("bgmv_shrink_slices", slot_table)
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
        launchable(shrink_slices_kernel, inputs)[(triton.cdiv(slices * max_rank, launch["BLOCK_N"]) * splits, batch)](
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
            SPLITS=splits,
            BLOCK_K=width,
            num_warps=min(max(width // 256, 1), 8),
            **overlap(inputs, operands_ready),
            **launch,
        )

"""LoRA A and B for prefill: tokens grouped into segments, each segment with its own adapter.

After Punica's SGMV (Chen et al. 2023, arXiv 2310.18547): tiles of tokens on the tensor cores, fp32 accumulation, one
launch for all slices of a packed projection group. Tokens outside every segment and segments of index -1 are
neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import interpreter_on, launchable, overlap, use_triton
from kernels.lora_checks import (
    FLOATS,
    INTEGERS,
    check_arena,
    check_indices,
    check_output,
    check_rows,
    check_segments,
    check_slots,
    check_tensor,
)
from kernels.lora_group import LoraGroup
from kernels.op_configs import get_lora_op_configs
from kernels.sgmv_kernels import combine_kernel, expand_kernel, shrink_kernel

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
    operands_ready: bool = False,
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
        operands_ready: no kernel that may still be running when this one is launched writes ``arena``, ``slot_table``,
            ``segment_starts`` or ``lora_indices``. A GPU of compute capability 9.0 or later then reads them while the
            kernel before this one in the stream finishes.

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
        operands_ready,
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
    operands_ready: bool = False,
) -> None:
    """``output[t, c] (+)= B[lora_indices[i], s] @ inputs[s, t, :rank]`` for each slice s and token t of segment i.

    ``c`` are the columns of slice s, ``out_start(s) ... out_start(s) + out_features[s]``.

    Args:
        inputs: (slices, tokens, max_rank) fp32, as :func:`sgmv_shrink` writes it.
        arena, slot_table, segment_starts, lora_indices, group, max_segment: as in :func:`sgmv_shrink`.
        output: (tokens, >= group.out_total) fp16|bf16|fp32, in place; row stride free.
        add_inputs: add to the output; False overwrites it.
        operands_ready: as in :func:`sgmv_shrink`; ``inputs`` need not be ready.

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
        operands_ready,
    )


# The shrink's sum over a row of A is defined as the sum of its chunks' sums, in their order. So its bits are the
# same whether one program adds the chunks up or one launch computes them side by side and a second one adds them.
CHUNK = 512
# Programs below which the chunks are computed side by side: about one for each of an H100's 132 multiprocessors, where
# a layer of Llama-3-8B takes 87 us side by side at 2048 tokens (117 otherwise), 272 at 8192 (204 otherwise).
SPLIT_BELOW = 128
COMBINE = {"BLOCK_M": 8, "num_warps": 4}


_COMMON = "Tensor segment_starts, Tensor lora_indices, int unit, int in_features, int[] out_features, int max_segment"
torch.library.define(
    "lorafleet::sgmv_shrink",
    f"(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, {_COMMON}, bool operands_ready=False) -> ()",
)
torch.library.define(
    "lorafleet::sgmv_expand",
    f"(Tensor inputs, Tensor arena, Tensor slot_table, Tensor(a!) output, {_COMMON}, bool add_inputs=True, "
    "bool operands_ready=False) -> ()",
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
    operands_ready: bool = False,
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
    operands_ready: bool = False,
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
    operands_ready: bool = False,
) -> None:
    tensors = (inputs, arena, slot_table, output, segment_starts, lora_indices)
    _check_shrink(*tensors, unit, in_features, out_features, max_segment)
    check_indices("sgmv_shrink", lora_indices, slot_table.shape[0])
    check_segments("sgmv_shrink", segment_starts, inputs.shape[0], max_segment)
    check_slots("sgmv_shrink", slot_table)
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.sgmv_shrink(*tensors, group, max_segment)
        return
    slices, tokens, max_rank = output.shape
    segments = lora_indices.shape[0]
    if segments == 0 or max_segment == 0:
        return
    launch = get_lora_op_configs("sgmv_shrink", 1, in_features, rank=slices * max_rank)
    if inputs.dtype != arena.dtype or arena.dtype == torch.float32:
        launch |= {"BLOCK_M": 32, "BLOCK_N": min(launch["BLOCK_N"], 32), "BLOCK_K": 32, "num_stages": 2}
    grid = _Grid.of(tokens, segments, max_segment, launch["BLOCK_M"], slices * max_rank, launch["BLOCK_N"])
    chunks = -(-in_features // CHUNK)
    split = chunks > 1 and grid.programs < SPLIT_BELOW
    # One more dimension in front for the chunks' sums; neither host nor device waits for it, so a graph can hold it.
    parts = output.new_empty((chunks, *output.shape)) if split else output[None]
    with torch.cuda.device_of(inputs):
        launchable(shrink_kernel, inputs)[(grid.programs, chunks if split else 1)](
            inputs,
            arena,
            slot_table,
            parts,
            segment_starts,
            lora_indices,
            group.a_unit(0),
            in_features,
            slices,
            segments,
            grid.token_tiles,
            grid.columns,
            inputs.stride(0),
            *parts.stride()[:3],
            CHUNK=CHUNK,
            SPLIT=split,
            FLAT=grid.flat,
            # Triton's interpreter multiplies the bit patterns of bf16 operands of a dot.
            WIDEN=inputs.dtype != arena.dtype or (arena.dtype == torch.bfloat16 and interpreter_on()),
            **overlap(inputs, operands_ready),
            **launch,
        )
        if split:
            grid = _Grid.of(tokens, segments, max_segment, COMBINE["BLOCK_M"], slices * max_rank, launch["BLOCK_N"])
            launchable(combine_kernel, inputs)[(grid.programs,)](
                parts,
                slot_table,
                output,
                segment_starts,
                lora_indices,
                slices,
                chunks,
                segments,
                grid.token_tiles,
                grid.columns,
                *parts.stride()[:3],
                *output.stride()[:2],
                BLOCK_N=launch["BLOCK_N"],
                FLAT=grid.flat,
                **overlap(inputs, operands_ready),
                **COMBINE,
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
    operands_ready: bool = False,
) -> None:
    tensors = (inputs, arena, slot_table, output, segment_starts, lora_indices)
    _check_expand(*tensors, unit, in_features, out_features, max_segment, add_inputs)
    check_indices("sgmv_expand", lora_indices, slot_table.shape[0])
    check_segments("sgmv_expand", segment_starts, inputs.shape[1], max_segment)
    check_slots("sgmv_expand", slot_table)
    group = LoraGroup(unit, in_features, tuple(out_features))
    if not use_triton(inputs):
        reference.sgmv_expand(*tensors, group, max_segment, add_inputs)
        return
    segments = lora_indices.shape[0]
    if segments == 0 or max_segment == 0:
        return
    max_rank = inputs.shape[2]
    launch = get_lora_op_configs("sgmv_expand", 1, group.out_total, rank=max_rank)
    if arena.dtype == torch.float32:
        launch |= {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16}
    column_tiles = sum(-(-width // launch["BLOCK_N"]) for width in out_features)
    grid = _Grid.of(inputs.shape[1], segments, max_segment, launch["BLOCK_M"], column_tiles, 1)
    with torch.cuda.device_of(inputs):
        launchable(expand_kernel, inputs)[(grid.programs,)](
            *tensors,
            group.b_unit(0),
            *[*out_features, 0, 0, 0][:4],
            segments,
            grid.token_tiles,
            grid.columns,
            inputs.stride(0),
            inputs.stride(1),
            output.stride(0),
            EXACT=arena.dtype == torch.float32,
            ONE_STEP=max_rank <= launch["BLOCK_K"],
            EVEN_K=max_rank % launch["BLOCK_K"] == 0,
            FLAT=grid.flat,
            ADD_INPUTS=add_inputs,
            **overlap(inputs, operands_ready),
            **launch,
        )


class _Grid(NamedTuple):
    """How a launch is divided: programs in all, column tiles of a token tile, token tiles of a segment."""

    programs: int
    columns: int
    token_tiles: int
    flat: bool  # token tiles are dealt out to the segments by their lengths, not the same number to each

    @staticmethod
    def of(tokens: int, segments: int, max_segment: int, block_m: int, width: int, block_n: int) -> _Grid:
        """The smaller of the two grids: nothing on the host knows how long each segment is."""
        columns, token_tiles = -(-width // block_n), -(-max_segment // block_m)
        even, flat = segments * token_tiles, -(-tokens // block_m) + segments
        return _Grid(min(even, flat) * columns, columns, token_tiles, flat < even)

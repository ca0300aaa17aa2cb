"""Device functions that the LoRA kernels share."""

from __future__ import annotations

from kernels.dispatch import gdc_wait, jit, tl


@jit
def locate_tile(tile, n0, n1, n2, n3, BLOCK_N: tl.constexpr):
    """Which slice a tile belongs to, the columns before that slice, and the tile's first column and width in it.

    Tiles are numbered through the slices; each slice ends at its own last, possibly partial, tile.
    """
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    past0 = (tile >= end0).to(tl.int32)
    past1 = (tile >= end1).to(tl.int32)
    past2 = (tile >= end2).to(tl.int32)
    before = past0 * n0 + past1 * n1 + past2 * n2
    width = n0 + past0 * (n1 - n0) + past1 * (n2 - n1) + past2 * (n3 - n2)
    first = (tile - past0 * end0 - past1 * (end1 - end0) - past2 * (end2 - end1)) * BLOCK_N
    return past0 + past1 + past2, before, first, width - first


@jit
def wait_in_one_program(WAIT: tl.constexpr):
    """What a program with nothing to do owes the stream's order: while one waits, the kernel has not ended."""
    if WAIT == "late" and tl.program_id(0) + tl.program_id(1) == 0:
        gdc_wait()


@jit
def next_slot(lora_indices_ptr, row, turn, batch, ROWS: tl.constexpr):
    """The slot of the ``turn``-th of the ROWS rows from ``row`` on; -1 where one before it has the same."""
    slot = tl.load(lora_indices_ptr + row + turn, mask=row + turn < batch, other=-1).to(tl.int64)
    lane = tl.arange(0, ROWS)
    before = tl.load(lora_indices_ptr + row + lane, mask=(lane < turn) & (row + lane < batch), other=-1).to(tl.int64)
    return tl.where(tl.max((before == slot).to(tl.int32)) > 0, -1, slot)


@jit
def has_slot(lora_indices_ptr, row, other, batch, slot, ROWS: tl.constexpr):
    """Whether the ``other``-th of the ROWS rows from ``row`` on has this slot. One row has its own."""
    if ROWS == 1:
        return True
    return tl.load(lora_indices_ptr + row + other, mask=row + other < batch, other=-1).to(tl.int64) == slot

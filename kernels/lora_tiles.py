"""Device functions that the LoRA kernels share."""

from __future__ import annotations

from kernels.dispatch import gdc_wait, jit, tl


@jit
def tile_products(
    x_ptr, weight_ptr, rows, columns, x_stride, row_stride, column_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, CAST_TYPE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_K) fp32 products of a weight tile with an input row; zero past ``rows`` or ``columns``.

    EVEN_K: BLOCK_K columns exist. CAST_TYPE: the input is fp32 already, only the weights need widening.
    """
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)
    mask = n < rows
    if EVEN_K:
        x = tl.load(x_ptr + k * x_stride)
    else:
        x = tl.load(x_ptr + k * x_stride, mask=k < columns, other=0.0)
        mask = mask & (k[None, :] < columns)
    if not CAST_TYPE:  # the product of two 16-bit floats is exact in fp32
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + n * row_stride + k[None, :] * column_stride, mask=mask, other=0.0)
    return weight.to(tl.float32) * x[None, :]


@jit
def row_products(
    x_ptr, weight_ptr, rows, columns, row_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same summed over steps of BLOCK_K columns, for contiguous rows; still (BLOCK_N, BLOCK_K)."""
    products = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(0, columns, BLOCK_K):
        products += tile_products(
            x_ptr + k, weight_ptr + k, rows, columns - k, 1, row_stride, 1, BLOCK_N, BLOCK_K, False, False
        )
    return products


@jit
def write_tile(out_ptr, values, rows, out_stride, BLOCK_N: tl.constexpr, ADD_INPUTS: tl.constexpr):
    """Stores or adds fp32 ``values``, rounding once to the output's dtype."""
    n = tl.arange(0, BLOCK_N)
    mask = n < rows
    if ADD_INPUTS:
        values += tl.load(out_ptr + n * out_stride, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * out_stride, values.to(out_ptr.dtype.element_ty), mask=mask)


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
def leads_its_share(lora_indices_ptr, row, slot, SHARE: tl.constexpr):
    """Whether ``row`` is the first with its slot in its aligned block of SHARE rows, for which it then stands."""
    before = row // SHARE * SHARE + tl.arange(0, SHARE)
    slots = tl.load(lora_indices_ptr + before, mask=before < row, other=-1)
    return tl.sum((slots == slot).to(tl.int32), 0) == 0


@jit
def wait_in_one_program(WAIT: tl.constexpr):
    """What a program with nothing to do owes the stream's order: while one waits, the kernel has not ended."""
    if WAIT == "late" and tl.program_id(0) + tl.program_id(1) == 0:
        gdc_wait()

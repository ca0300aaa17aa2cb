"""The Triton kernels of :mod:`kernels.sgmv`."""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.lora_tiles import locate_tile


@jit
def _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M: tl.constexpr, FLAT: tl.constexpr):
    """The segment that a token tile lies in, the tile's first token, and how many of the segment's tokens are left.

    FLAT: segment i owns the tiles from ``starts[i] // BLOCK_M + i`` on, which leaves every segment room for its
    tiles and at most one tile a segment unused. Otherwise every segment owns ``token_tiles``.
    """
    if FLAT:
        lane = tl.arange(0, 128)
        found = 0
        for first in range(0, segments, 128):
            index = first + lane
            start = tl.load(segment_starts_ptr + index, mask=index < segments, other=0)
            found += tl.sum(((start // BLOCK_M + index <= tile) & (index < segments)).to(tl.int32))
        segment = tl.maximum(found - 1, 0)
        begin = tl.load(segment_starts_ptr + segment).to(tl.int64)
        skip = (tile - segment - begin // BLOCK_M).to(tl.int32) * BLOCK_M
    else:
        segment = tile // token_tiles
        begin = tl.load(segment_starts_ptr + segment).to(tl.int64)
        skip = (tile % token_tiles) * BLOCK_M
    tokens = (tl.load(segment_starts_ptr + segment + 1) - begin).to(tl.int32) - skip
    return segment, begin + skip, tl.where(skip < 0, 0, tokens)


@jit
def _shrink_products(
    x_ptr, weight_ptr, tokens, count, x_row_stride, K, first_k, last_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 products over columns first_k ... last_k, each chunk's sum added to those before it."""
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m[:, None].to(tl.int64) * x_row_stride + k[None, :]
    weight_tile = weight_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    rows, columns = (m < tokens)[:, None], (n < count)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(first_k, last_k, BLOCK_K):
        left = k < K - done
        x = tl.load(x_tile + done, mask=rows & left[None, :], other=0.0)
        weight = tl.load(weight_tile + done, mask=left[:, None] & columns, other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        part = tl.dot(x, weight, part, input_precision="ieee")
        if not SPLIT:
            ends = (done + BLOCK_K) % CHUNK == 0
            total += tl.where(ends, part, 0.0)
            part = tl.where(ends, 0.0, part)
    return total + part


@jit(do_not_specialize=["a_unit", "SLICES", "segments", "token_tiles", "column_tiles"])  # compile once for all layers
def shrink_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    a_unit, K, SLICES, segments, token_tiles, column_tiles,
    x_row_stride, out_chunk_stride, out_slice_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * rank tiles, chunks if SPLIT); a group's A is one matrix of slices * rank rows."""
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        return
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)
    first = (tl.program_id(0) % column_tiles) * BLOCK_N
    count = rank * SLICES - first
    if count <= 0:
        return
    start = tl.load(slot_table_ptr + slot * 2) + rank * a_unit.to(tl.int64) + first.to(tl.int64) * K
    x_ptr = input_ptr + token * x_row_stride
    chunk = tl.program_id(1)
    if SPLIT:
        first_k = chunk * CHUNK
        last_k = tl.minimum(first_k + CHUNK, K)
    else:
        first_k = 0
        last_k = K
    if ALIGNED and start % 8 == 0:
        total = _shrink_products(
            x_ptr, arena_ptr + start // 8 * 8, tokens, count, x_row_stride, K, first_k, last_k,
            BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, SPLIT, WIDEN,
        )  # fmt: skip
    else:
        total = _shrink_products(
            x_ptr, arena_ptr + start, tokens, count, x_row_stride, K, first_k, last_k,
            BLOCK_M, BLOCK_N, BLOCK_K, CHUNK, SPLIT, WIDEN,
        )  # fmt: skip

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    column = ((first + n) // rank).to(tl.int64) * out_slice_stride + (first + n) % rank
    target = out_ptr + chunk * out_chunk_stride + (token + m)[:, None] * out_row_stride + column[None, :]
    tl.store(target, total, mask=(m < tokens)[:, None] & (n < count)[None, :])


@jit(do_not_specialize=["SLICES", "chunks", "segments", "token_tiles", "column_tiles"])
def combine_kernel(
    parts_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    SLICES, chunks, segments, token_tiles, column_tiles,
    chunk_stride, slice_stride, row_stride, out_slice_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Sums the chunks of a split shrink in their order. Grid (token tiles * rank tiles,)."""
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        return
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)
    index = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (m < tokens)[:, None] & (index < rank * SLICES)[None, :]
    which, column, row = (index // rank).to(tl.int64), index % rank, (token + m)[:, None]
    parts = parts_ptr + row * row_stride + (which * slice_stride + column)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, chunks, 16):  # sixteen loads in flight
        for step in tl.static_range(16):  # pyright: ignore[reportGeneralTypeIssues]
            chunk = done + step
            total += tl.load(parts + chunk.to(tl.int64) * chunk_stride, mask=mask & (chunk < chunks), other=0.0)
    tl.store(out_ptr + row * out_row_stride + (which * out_slice_stride + column)[None, :], total, mask=mask)


@jit
def _dot(x, weight, total, TERMS: tl.constexpr):
    """``total + x @ weight`` with fp32 ``x``; TERMS: how the tensor cores get at it, 0 for fp32 arithmetic."""
    if TERMS == 0:
        total = tl.dot(x, weight.to(tl.float32), total, input_precision="ieee")
    elif TERMS == 2:
        # A 16-bit weight is exact in tf32, and x is the sum of two tf32 numbers but for its last bit.
        high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        wide = weight.to(tl.float32)
        total = tl.dot(x - high, wide, total, input_precision="tf32")
        total = tl.dot(high, wide, total, input_precision="tf32")
    else:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, weight, total)
        total = tl.dot(middle, weight, total)
        total = tl.dot(high, weight, total)
    return total


@jit
def _b_tile(
    arena_ptr, start, n_stride, k_stride, columns, ranks,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_N) of a slice's B, zero past ``columns`` or ``ranks``."""
    n = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    return tl.load(arena_ptr + start + n * n_stride + k * k_stride, mask=(k < ranks) & (n < columns), other=0.0)


@jit
def _load_b(
    arena_ptr, slice_start, first, width, rank, done,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANK_MAJOR: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK_N) of a slice's B from rank ``done`` and column ``first`` on.

    Loads of 16 bytes where the addresses allow; ``// 8 * 8`` lets the compiler see that they do.
    """
    if RANK_MAJOR:
        start = slice_start + done * width.to(tl.int64) + first
        if start % 8 == 0:
            weight = _b_tile(arena_ptr, start // 8 * 8, 1, width, width - first, rank - done, BLOCK_N, BLOCK_K)
        else:
            weight = _b_tile(arena_ptr, start, 1, width, width - first, rank - done, BLOCK_N, BLOCK_K)
    else:
        start = slice_start + rank * first.to(tl.int64) + done
        if (start % 8 == 0) & (rank % 8 == 0):
            rank = rank // 8 * 8
            weight = _b_tile(arena_ptr, start // 8 * 8, rank, 1, width - first, rank - done, BLOCK_N, BLOCK_K)
        else:
            weight = _b_tile(arena_ptr, start, rank, 1, width - first, rank - done, BLOCK_N, BLOCK_K)
    return weight


@jit(do_not_specialize=["b_unit", "segments", "token_tiles", "column_tiles"])
def expand_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    b_unit, n0, n1, n2, n3, segments, token_tiles, column_tiles, x_slice_stride, x_row_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr, ONE_STEP: tl.constexpr, EVEN_K: tl.constexpr, RANK_MAJOR: tl.constexpr,
    FLAT: tl.constexpr, ADD_INPUTS: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * column tiles of all slices,), neighbours side by side in the output's rows.

    ONE_STEP: no rank exceeds BLOCK_K. EVEN_K: rows of the input are a multiple of BLOCK_K long.
    """
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        return
    index, before, first, count = locate_tile(tl.program_id(0) % column_tiles, n0, n1, n2, n3, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    target = out_ptr + (token + m)[:, None] * out_row_stride + (before + first + n)[None, :]
    mask = (m < tokens)[:, None] & (n < count)[None, :]
    if ADD_INPUTS:
        old = tl.load(target, mask=mask, other=0.0)  # asked for first: it comes from farthest

    offset = tl.load(slot_table_ptr + slot * 2)
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)
    x_ptr = input_ptr + index.to(tl.int64) * x_slice_stride + (token + m)[:, None] * x_row_stride + k[None, :]
    slice_start = offset + rank * (b_unit + before).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, BLOCK_K if ONE_STEP else rank, BLOCK_K):
        if EVEN_K:  # the mask of rows alone keeps the loads wide; what lies past the rank is dropped afterwards
            x = tl.load(x_ptr + done, mask=(m < tokens)[:, None], other=0.0)
            x = tl.where((k < rank - done)[None, :], x, 0.0)
        else:
            x = tl.load(x_ptr + done, mask=(m < tokens)[:, None] & (k < rank - done)[None, :], other=0.0)
        weight = _load_b(arena_ptr, slice_start, first, first + count, rank, done, BLOCK_N, BLOCK_K, RANK_MAJOR)
        total = _dot(x, weight, total, TERMS)

    if ADD_INPUTS:
        total += old.to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)

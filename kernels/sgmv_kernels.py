"""The Triton kernels of :mod:`kernels.sgmv`."""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, tl
from kernels.lora_tiles import locate_tile, wait_in_one_program


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
    SPLIT: tl.constexpr, FLAT: tl.constexpr, WIDEN: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * rank tiles, chunks if SPLIT); a group's A is one matrix of slices * rank rows."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        wait_in_one_program(WAIT)
        return
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)
    first = (tl.program_id(0) % column_tiles) * BLOCK_N
    count = rank * SLICES - first
    if count <= 0:
        wait_in_one_program(WAIT)
        return
    # A multiple of 8 as it is (packed_rank), written so that the compiler sees it and loads whole vectors.
    start = (tl.load(slot_table_ptr + slot * 2) + rank * a_unit.to(tl.int64)) // 8 * 8 + first.to(tl.int64) * K
    x_ptr = input_ptr + token * x_row_stride
    chunk = tl.program_id(1)
    if SPLIT:
        first_k = chunk * CHUNK
        last_k = tl.minimum(first_k + CHUNK, K)
    else:
        first_k = 0
        last_k = K
    if WAIT == "late":
        gdc_wait()
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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Sums the chunks of a split shrink in their order. Grid (token tiles * rank tiles,)."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        wait_in_one_program(WAIT)
        return
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)
    if WAIT == "late":
        gdc_wait()
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
def _dot(x, weight, total, EXACT: tl.constexpr):
    """``total + x @ weight`` with fp32 ``x``; EXACT: in fp32 arithmetic, else with 16-bit weights on tensor cores."""
    if EXACT:
        total = tl.dot(x, weight.to(tl.float32), total, input_precision="ieee")
    else:
        # A 16-bit weight is exact in tf32, and x is the sum of two tf32 numbers but for its last bit.
        high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        wide = weight.to(tl.float32)
        total = tl.dot(x - high, wide, total, input_precision="tf32")
        total = tl.dot(high, wide, total, input_precision="tf32")
    return total


@jit
def _load_x(place, rows, left, EVEN_K: tl.constexpr):
    """Shrunk activations, zero outside of ``rows`` and of the columns ``left`` of the rank."""
    if EVEN_K:  # the mask of rows alone keeps the loads wide; what lies past the rank is dropped afterwards
        x = tl.load(place, mask=rows, other=0.0)
        x = tl.where(left, x, 0.0)
    else:
        x = tl.load(place, mask=rows & left, other=0.0)
    return x


@jit
def _load_b(weight_ptr, rank, columns, left, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK_N) of B stored (columns, rank), zero past ``columns`` or where no rank is ``left``."""
    n = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    return tl.load(weight_ptr + n * rank + k, mask=(k < left) & (n < columns), other=0.0)


@jit(do_not_specialize=["b_unit", "segments", "token_tiles", "column_tiles"])
def expand_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, segment_starts_ptr, lora_indices_ptr,
    b_unit, n0, n1, n2, n3, segments, token_tiles, column_tiles, x_slice_stride, x_row_stride, out_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EXACT: tl.constexpr, ONE_STEP: tl.constexpr, EVEN_K: tl.constexpr,
    FLAT: tl.constexpr, ADD_INPUTS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles * column tiles of all slices,), neighbours side by side in the output's rows.

    ONE_STEP: no rank exceeds BLOCK_K. EVEN_K: rows of the input are a multiple of BLOCK_K long.
    """
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    tile = tl.program_id(0) // column_tiles
    segment, token, tokens = _find_tile(tile, segment_starts_ptr, segments, token_tiles, BLOCK_M, FLAT)
    slot = tl.load(lora_indices_ptr + segment).to(tl.int64)
    if (slot < 0) | (tokens <= 0):
        wait_in_one_program(WAIT)
        return
    index, before, first, count = locate_tile(tl.program_id(0) % column_tiles, n0, n1, n2, n3, BLOCK_N)
    # Multiples of 8 as they are (packed_rank), written so that the compiler sees it and loads whole vectors.
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32) // 8 * 8
    start = (tl.load(slot_table_ptr + slot * 2) + rank * (b_unit + before + first).to(tl.int64)) // 8 * 8
    weight = _load_b(arena_ptr + start, rank, count, rank, BLOCK_N, BLOCK_K)
    if WAIT == "late":
        gdc_wait()
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = (m < tokens)[:, None]
    target = out_ptr + (token + m)[:, None] * out_row_stride + (before + first + n)[None, :]
    mask = rows & (n < count)[None, :]
    if ADD_INPUTS:
        old = tl.load(target, mask=mask, other=0.0)
        tl.debug_barrier()  # or the compiler asks for it after it has waited for x: it comes from farther
    place = input_ptr + index.to(tl.int64) * x_slice_stride + (token + m)[:, None] * x_row_stride + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = _dot(_load_x(place, rows, (k < rank)[None, :], EVEN_K), weight, total, EXACT)
    if not ONE_STEP:
        for done in range(BLOCK_K, rank, BLOCK_K):
            x = _load_x(place + done, rows, (k < rank - done)[None, :], EVEN_K)
            weight = _load_b(arena_ptr + start + done, rank, count, rank - done, BLOCK_N, BLOCK_K)
            total = _dot(x, weight, total, EXACT)

    if ADD_INPUTS:
        total += old.to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)

"""The Triton kernels of ``kernels.attention``, which says what they compute and launches them.

Strides are in elements, offsets int64. ``scale_log2`` is the softmax scale times log2(e): the softmax runs on exp2.
WIDEN: multiply in fp32 (Triton's interpreter would multiply the bit patterns of bf16).
"""

from __future__ import annotations

from kernels.dispatch import jit, tl


@jit
def _absorb(
    q,  # (BLOCK_M, BLOCK_D)
    positions,  # (BLOCK_N,) key positions of this block
    held,  # (BLOCK_N,) bool: keys that may be read
    seen,  # (BLOCK_M, BLOCK_N) bool: who may look where
    peak,  # (BLOCK_M,) running maximum of the scores, in log2
    mass,  # (BLOCK_M,) running sum of the weights
    total,  # (BLOCK_M, BLOCK_D) running weighted sum of the values
    keys,  # of this kv head
    values,
    pages,  # this row of the page table
    k_page,
    k_slot,
    v_page,
    v_slot,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One block of keys of the online softmax."""
    dims = tl.arange(0, BLOCK_D)
    page = tl.load(pages + positions // PAGE_SIZE, mask=held, other=0).to(tl.int64)
    slot = positions % PAGE_SIZE
    # Zeros, not garbage, where nothing may be read: a weight of 0 times NaN would be NaN.
    key_offsets = (page * k_page + slot * k_slot)[None, :] + dims[:, None]
    k = tl.load(keys + key_offsets, mask=held[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A query that has seen no key yet has a peak of -inf; -inf - -inf would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - base)
    weights = tl.exp2(scores - base[:, None])
    value_offsets = (page * v_page + slot * v_slot)[:, None] + dims[None, :]
    v = tl.load(values + value_offsets, mask=held[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    mass = mass * shrink + tl.sum(weights, 1)
    narrow = weights.to(v.dtype)
    if WIDEN:
        narrow = narrow.to(tl.float32)
        v = v.to(tl.float32)
    total = total * shrink[:, None] + tl.dot(narrow, v, input_precision="ieee")
    return new_peak, mass, total


@jit
def prefill_kernel(
    q,
    keys,
    values,
    page_table,
    query_starts,
    context_lens,
    out,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    table_row,
    out_token,
    out_head,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (tiles, rows, kv_heads). A tile is BLOCK_M of the row's (query, head of the group) pairs, queries outermost.

    Pairs are packed without gaps, so a group of any size wastes nothing but the end of the last tile.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    begin = tl.load(query_starts + row)
    queries = tl.load(query_starts + row + 1) - begin
    if tile * BLOCK_M < queries * GROUP:
        cached = tl.load(context_lens + row) - queries
        pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query = pair // GROUP
        head = kv_head * GROUP + pair % GROUP
        token = (begin + query).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        live = (query < queries)[:, None] & (dims < HEAD_DIM)[None, :]
        q_tile = tl.load(q + (token * q_token + head * q_head)[:, None] + dims[None, :], mask=live, other=0.0)
        if WIDEN:
            q_tile = q_tile.to(tl.float32)
        position = cached + query
        # What the tile's queries may see together: these positions hold keys, and no others are read.
        key_end = cached + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, queries)
        key_low = 0
        if WINDOW > 0:
            key_low = tl.maximum(cached + tile * BLOCK_M // GROUP - WINDOW + 1, 0)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(key_low // BLOCK_N * BLOCK_N, key_end, BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            held = (positions >= key_low) & (positions < key_end)
            seen = positions[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (positions[None, :] > position[:, None] - WINDOW)
            peak, mass, total = _absorb(
                q_tile,
                positions,
                held,
                seen,
                peak,
                mass,
                total,
                keys + kv_head * k_head,
                values + kv_head * v_head,
                page_table + row.to(tl.int64) * table_row,
                k_page,
                k_slot,
                v_page,
                v_slot,
                scale_log2,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_D,
                WIDEN,
            )
        result = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
        offsets = (token * out_token + head * out_head)[:, None] + dims[None, :]
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=live)


@jit
def _split_span(
    context, split, SPLITS: tl.constexpr, MIN_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(first key seen by the row, first key of the split, key after its last); empty when first >= last.

    Splits take whole blocks, MIN_BLOCKS at least, and are equal but for the last ones.
    """
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0)
    first_block = low // BLOCK_N
    blocks = tl.cdiv(context, BLOCK_N) - first_block
    per_split = tl.maximum(tl.cdiv(blocks, SPLITS), MIN_BLOCKS)
    begin = (first_block + split * per_split) * BLOCK_N
    return low, begin, tl.minimum(begin + per_split * BLOCK_N, context)


@jit
def decode_kernel(
    q,
    keys,
    values,
    page_table,
    context_lens,
    out,
    sums,
    peaks,
    masses,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    table_row,
    out_token,
    out_head,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (SPLITS, kv_heads, rows). The tile is the group's query heads, padded to BLOCK_M.

    One split writes the result; several write unnormalised sums (rows, heads, SPLITS, HEAD_DIM) with their peak
    and mass (rows, heads, SPLITS) for ``combine_kernel``. An empty split of several writes nothing.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens + row)
    low, begin, end = _split_span(context, split, SPLITS, MIN_BLOCKS, WINDOW, BLOCK_N)
    if (begin < end) | (SPLITS == 1):
        member = tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + member
        dims = tl.arange(0, BLOCK_D)
        live = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        q_tile = tl.load(q + row * q_token + (head * q_head)[:, None] + dims[None, :], mask=live, other=0.0)
        if WIDEN:
            q_tile = q_tile.to(tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(begin, end, BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            held = (positions >= low) & (positions < end)
            peak, mass, total = _absorb(
                q_tile,
                positions,
                held,
                held[None, :],
                peak,
                mass,
                total,
                keys + kv_head * k_head,
                values + kv_head * v_head,
                page_table + row * table_row,
                k_page,
                k_slot,
                v_page,
                v_slot,
                scale_log2,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_D,
                WIDEN,
            )
        if SPLITS == 1:
            result = total / tl.where(mass == 0.0, 1.0, mass)[:, None]  # no key at all: zeros
            offsets = row * out_token + (head * out_head)[:, None] + dims[None, :]
            tl.store(out + offsets, result.to(out.dtype.element_ty), mask=live)
        else:
            piece = (row * tl.num_programs(1) * GROUP + head) * SPLITS + split
            tl.store(sums + (piece * HEAD_DIM)[:, None] + dims[None, :], total, mask=live)
            tl.store(peaks + piece, peak, mask=member < GROUP)
            tl.store(masses + piece, mass, mask=member < GROUP)


@jit
def combine_kernel(
    sums,
    peaks,
    masses,
    context_lens,
    out,
    out_token,
    out_head,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (heads, rows): joins a head's splits. Only splits that have keys are read; none give zeros."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    _, begin, end = _split_span(tl.load(context_lens + row), split, SPLITS, MIN_BLOCKS, WINDOW, BLOCK_N)
    used = (begin < end) & (split < SPLITS)
    piece = (row * tl.num_programs(0) + head) * SPLITS + split
    peak = tl.load(peaks + piece, mask=used, other=float("-inf"))
    mass = tl.load(masses + piece, mask=used, other=0.0)
    dims = tl.arange(0, BLOCK_D)
    inside = dims < HEAD_DIM
    total = tl.load(sums + (piece * HEAD_DIM)[:, None] + dims[None, :], mask=used[:, None] & inside[None, :], other=0.0)
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(weight * mass, 0)
    result = tl.sum(weight[:, None] * total, 0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * out_token + head * out_head + dims, result.to(out.dtype.element_ty), mask=inside)

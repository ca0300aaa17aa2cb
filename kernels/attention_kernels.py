"""The Triton kernels of ``kernels.attention``, which says what they compute and launches them.

Strides are in elements, offsets int64; keys and values share theirs. ``scale_log2`` is the softmax scale times
log2(e): the softmax runs on exp2. WIDEN: multiply in fp32 (Triton's interpreter would multiply the bit patterns of
bf16). WAIT: as ``kernels.dispatch.overlap`` says; the decode kernels are launched plainly.
"""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, tl


@jit
def _walk(
    q,  # (BLOCK_M, BLOCK_D)
    position,  # (BLOCK_M,) or (1,) position of each query
    peak,  # (BLOCK_M,) running maximum of the scores, in log2
    mass,  # (BLOCK_M, BLOCK_N) running sums of the weights by place in the block; (BLOCK_M,) unless SPREAD
    total,  # (BLOCK_M, BLOCK_D) running weighted sum of the values
    begin,  # first position, a multiple of BLOCK_N
    end,  # position after the last; none from here on is read
    low,  # nor any before this one
    keys,  # of this kv head
    values,
    pages,  # this row of the page table
    cache_page,
    cache_slot,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_SEEN: tl.constexpr,
    BLIND: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The online softmax over a range of keys.

    A block's page numbers are read one turn ahead, so that the loads of keys and values depend on no load of their own
    turn: only then does Triton's pipeliner keep several blocks in flight. ALL_SEEN: every query sees every key of
    the range, which is whole blocks. BLIND: a query may have seen no key after a block.
    """
    lane = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    page = tl.load(pages + (begin + lane) // PAGE_SIZE, mask=(begin + lane >= low) & (begin + lane < end), other=0)
    for block in range(begin, end, BLOCK_N):
        positions = block + lane
        held = (dims < HEAD_DIM)[None, :]
        if not ALL_SEEN:
            held = held & ((positions >= low) & (positions < end))[:, None]
        offsets = (page.to(tl.int64) * cache_page + (positions % PAGE_SIZE) * cache_slot)[:, None] + dims[None, :]
        # Zeros, not garbage, where nothing may be read: a weight of 0 times NaN would be NaN.
        k = tl.load(keys + offsets, mask=held, other=0.0)
        v = tl.load(values + offsets, mask=held, other=0.0)
        coming = positions + BLOCK_N
        page = tl.load(pages + coming // PAGE_SIZE, mask=coming < end, other=0)
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not ALL_SEEN:
            seen = positions[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (positions[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        base = new_peak
        if BLIND:  # -inf - -inf would be NaN
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        mass = mass * shrink[:, None] + weights if SPREAD else mass * shrink + tl.sum(weights, 1)
        narrow = weights.to(v.dtype)
        if WIDEN:
            narrow = narrow.to(tl.float32)
            v = v.to(tl.float32)
        total = tl.dot(narrow, v, total * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, mass, total


# Integers that change from step to step and pointers into the middle of an array must not compile anew.
@jit(
    do_not_specialize=["table_row", "rows"],
    do_not_specialize_on_alignment=["page_table", "query_starts", "context_lens"],
)
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
    cache_page,
    cache_slot,
    cache_head,
    table_row,
    out_token,
    out_head,
    rows,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (KV_HEADS * places,), places at least the tiles of all rows. BLOCK_R: at least the rows.

    A tile is BLOCK_M of a row's (query, head of the group) pairs, queries outermost and packed without gaps, so a
    group of any size wastes nothing but the end of the row's last tile. The tiles of all rows lie behind each other;
    programs take them from the end, as a row's last tiles have the most keys.
    """
    if WAIT == "first":
        gdc_launch_dependents()
        gdc_wait()
    place = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    index = tl.arange(0, BLOCK_R)
    first_tokens = tl.load(query_starts + index, mask=index < rows, other=0)
    next_tokens = tl.load(query_starts + index + 1, mask=index < rows, other=0)
    tiles = tl.cdiv((next_tokens - first_tokens) * GROUP, BLOCK_M)
    ends = tl.cumsum(tiles, 0)
    if place < tl.sum(tiles, 0):
        passed = ends <= place
        row = tl.sum(passed.to(tl.int32), 0)
        tile = place - tl.max(tl.where(passed, ends, 0), 0)
        begin = tl.load(query_starts + row)
        queries = tl.load(query_starts + row + 1) - begin
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
        first_position = cached + tile * BLOCK_M // GROUP
        key_end = cached + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, queries)
        key_low = 0
        if WINDOW > 0:
            key_low = tl.maximum(first_position - WINDOW + 1, 0)
        start = key_low // BLOCK_N * BLOCK_N
        pages = page_table + row.to(tl.int64) * table_row
        keys += kv_head * cache_head
        values += kv_head * cache_head
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WINDOW == 0:
            # Blocks that all queries see whole.
            edge = (first_position + 1) // BLOCK_N * BLOCK_N
            peak, mass, total = _walk(
                q_tile,
                position,
                peak,
                mass,
                total,
                0,
                edge,
                0,
                keys,
                values,
                pages,
                cache_page,
                cache_slot,
                scale_log2,
                HEAD_DIM,
                PAGE_SIZE,
                WINDOW,
                BLOCK_N,
                BLOCK_D,
                True,
                False,
                False,
                WIDEN,
            )
            start = edge
        peak, mass, total = _walk(
            q_tile,
            position,
            peak,
            mass,
            total,
            start,
            key_end,
            key_low,
            keys,
            values,
            pages,
            cache_page,
            cache_slot,
            scale_log2,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            False,
            WINDOW > 0,
            False,
            WIDEN,
        )
        result = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
        offsets = (token * out_token + head * out_head)[:, None] + dims[None, :]
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=live)


@jit
def _split_plan(context, most, min_blocks, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key seen, its block, blocks a split, splits) of a row or of a vector of rows; no key gives no split.

    Splits take whole blocks, ``min_blocks`` at least, and are equal but for the last one.
    """
    low = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else context * 0
    first_block = low // BLOCK_N
    blocks = tl.cdiv(context, BLOCK_N) - first_block
    per_split = tl.maximum(tl.cdiv(blocks, most), min_blocks)
    return low, first_block, per_split, tl.cdiv(blocks, per_split)


@jit(
    do_not_specialize=["table_row", "rows", "room", "most", "min_blocks"],
    do_not_specialize_on_alignment=["page_table", "context_lens"],
)
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
    cache_page,
    cache_slot,
    cache_head,
    table_row,
    out_token,
    out_head,
    rows,
    room,
    most,
    min_blocks,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid (workers,), any number: the splits of all rows and kv heads lie behind each other and are dealt out.

    BLOCK_R: at least the rows. The tile is the group's query heads, padded to BLOCK_M. A row of one split has its
    result written; of several, unnormalised sums (rows, heads, room, HEAD_DIM) with their peak and mass (rows, heads,
    room) for ``combine_kernel``.
    """
    index = tl.arange(0, BLOCK_R)
    lengths = tl.load(context_lens + index, mask=index < rows, other=0)
    _, _, _, counts = _split_plan(lengths, most, min_blocks, WINDOW, BLOCK_N)
    counts = tl.where(index < rows, tl.maximum(counts, 1), 0)  # a padding row has zeros to write
    ends = tl.cumsum(counts, 0)
    items = tl.sum(counts, 0) * KV_HEADS
    member = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    live = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    # kv heads innermost: the heads of a position lie side by side in the cache and are read at the same time.
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        piece = item // KV_HEADS
        kv_head = tl.full((), item - piece * KV_HEADS, tl.int64)
        passed = ends <= piece
        row = tl.sum(passed.to(tl.int32), 0)
        split = piece - tl.max(tl.where(passed, ends, 0), 0)
        context = tl.load(context_lens + row)
        low, first_block, per_split, splits = _split_plan(context, most, min_blocks, WINDOW, BLOCK_N)
        begin = (first_block + split * per_split) * BLOCK_N
        end = tl.minimum(begin + per_split * BLOCK_N, context)
        row = row.to(tl.int64)
        head = kv_head * GROUP + member
        q_tile = tl.load(q + row * q_token + (head * q_head)[:, None] + dims[None, :], mask=live, other=0.0)
        if WIDEN:
            q_tile = q_tile.to(tl.float32)
        peak, mass, total = _walk(
            q_tile,
            tl.full([1], context - 1, tl.int32),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            begin,
            end,
            low,
            keys + kv_head * cache_head,
            values + kv_head * cache_head,
            page_table + row * table_row,
            cache_page,
            cache_slot,
            scale_log2,
            HEAD_DIM,
            PAGE_SIZE,
            WINDOW,
            BLOCK_N,
            BLOCK_D,
            False,
            False,  # a split begins in a block that has a key
            True,
            WIDEN,
        )
        whole = tl.sum(mass, 1)
        if splits <= 1:
            result = total / tl.where(whole == 0.0, 1.0, whole)[:, None]  # no key at all: zeros
            offsets = row * out_token + (head * out_head)[:, None] + dims[None, :]
            tl.store(out + offsets, result.to(out.dtype.element_ty), mask=live)
        else:
            place = (row * (KV_HEADS * GROUP) + head) * room + split
            tl.store(sums + (place * HEAD_DIM)[:, None] + dims[None, :], total, mask=live)
            tl.store(peaks + place, peak, mask=member < GROUP)
            tl.store(masses + place, whole, mask=member < GROUP)


@jit(do_not_specialize=["room", "most", "min_blocks"], do_not_specialize_on_alignment=["context_lens"])
def combine_kernel(
    sums,
    peaks,
    masses,
    context_lens,
    out,
    out_token,
    out_head,
    room,
    most,
    min_blocks,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (heads, rows): joins the splits, BLOCK_S at most, of a head of a row that has several."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    _, _, _, splits = _split_plan(tl.load(context_lens + row), most, min_blocks, WINDOW, BLOCK_N)
    if splits > 1:
        split = tl.arange(0, BLOCK_S)
        dims = tl.arange(0, BLOCK_D)
        used = split < splits
        piece = (row * tl.num_programs(0) + head) * room + split
        peak = tl.load(peaks + piece, mask=used, other=float("-inf"))
        mass = tl.load(masses + piece, mask=used, other=0.0)
        stored = used[:, None] & (dims < HEAD_DIM)[None, :]
        total = tl.load(sums + (piece * HEAD_DIM)[:, None] + dims[None, :], mask=stored, other=0.0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        result = tl.sum(weight[:, None] * total, 0) / tl.sum(weight * mass, 0)
        tl.store(out + row * out_token + head * out_head + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)

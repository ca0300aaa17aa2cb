"""The Triton kernels of :mod:`kernels.bgmv_shrink`: stacked adapters, and packed slices over a slot table."""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, tl
from kernels.lora_tiles import has_slot, next_slot, wait_in_one_program


@jit
def _shrink_in_one_step(
    input_ptr, place, out_ptr, mine, count, K, scaling, xm_stride, cm_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_K covers K: ``count`` rows of A in tiles of BLOCK_N, the next one loaded while one is multiplied."""
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    weight = tl.load(place, mask=(n < count)[:, None] & (k < K), other=0.0)
    if WAIT == "late":
        gdc_wait()
    xs = ()
    if ROWS > 1:  # a single row reads its inputs again for each tile: that is faster than holding on to registers
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            xs += (tl.load(input_ptr + other * xm_stride + k, mask=(k < K) & mine[other], other=0.0),)
    for done in range(0, count, BLOCK_N):
        wide = weight.to(tl.float32)
        place += BLOCK_N * K
        weight = tl.load(place, mask=(n < count - done - BLOCK_N)[:, None] & (k < K), other=0.0)
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            x = xs[other] if ROWS > 1 else tl.load(input_ptr + k, mask=k < K, other=0.0)
            total = tl.sum(wide * x.to(tl.float32), 1) * scaling  # pyright: ignore[reportAttributeAccessIssue]
            tl.store(out_ptr + other * cm_stride + done + n, total, mask=(n < count - done) & mine[other])


@jit
def _shrink_in_steps(
    input_ptr, place, out_ptr, mine, count, K, scaling, xm_stride, cm_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One tile of ``count`` rows of A along K, the next step loaded while one is multiplied."""
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < count)[:, None]
    weight = tl.load(place, mask=inside & (k < K), other=0.0)
    if WAIT == "late":
        gdc_wait()
    sums = ()
    for _ in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        sums += (tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32),)
    for done in range(0, K, BLOCK_K):
        wide = weight.to(tl.float32)
        weight = tl.load(place + done + BLOCK_K, mask=inside & (k < K - done - BLOCK_K), other=0.0)
        longer = ()
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            x = tl.load(input_ptr + other * xm_stride + done + k, mask=(k < K - done) & mine[other], other=0.0)
            longer += (sums[other] + wide * x.to(tl.float32),)
        sums = longer
    for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(out_ptr + other * cm_stride + n, tl.sum(sums[other], 1) * scaling, mask=(n < count) & mine[other])


@jit
def _shrink_slot(
    input_ptr, lora_ptr, out_ptr, lora_indices_ptr, slot, row, batch, count, K, scaling, xm_stride, cm_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ONE_STEP: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """``count`` rows of A of ``slot`` times each of the ROWS rows that has it; none for -1."""
    if slot >= 0:
        place = lora_ptr + tl.arange(0, BLOCK_N)[:, None].to(tl.int64) * K + tl.arange(0, BLOCK_K)
        mine = ()
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            mine += (has_slot(lora_indices_ptr, row, other, batch, slot, ROWS),)
        if ONE_STEP:
            _shrink_in_one_step(
                input_ptr, place, out_ptr, mine, count, K, scaling, xm_stride, cm_stride, ROWS, BLOCK_N, BLOCK_K, WAIT
            )
        else:
            _shrink_in_steps(
                input_ptr, place, out_ptr, mine, count, K, scaling, xm_stride, cm_stride, ROWS, BLOCK_N, BLOCK_K, WAIT
            )


@jit(do_not_specialize=["batch"])
def shrink_kernel(
    input_ptr, lora_ptr, out_ptr, batch, N, K, lora_indices, scaling, xm_stride, l0_stride, cm_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_N: tl.constexpr,
    ONE_STEP: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (SPLIT_N, batch / ROWS); N is the rank, K the input width."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64) * ROWS
    share = tl.cdiv(tl.cdiv(N, SPLIT_N), BLOCK_N) * BLOCK_N
    start = tl.program_id(0) * share
    count = tl.minimum(N - start, share)  # negative where the shares before cover all of N
    input_ptr += row * xm_stride
    lora_ptr += start.to(tl.int64) * K
    out_ptr += row * cm_stride + start
    if ROWS == 1:
        slot = tl.load(lora_indices + row).to(tl.int64)
        _shrink_slot(
            input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K, scaling,
            xm_stride, cm_stride, ROWS, BLOCK_N, BLOCK_K, ONE_STEP, WAIT,
        )  # fmt: skip
    else:
        for turn in range(ROWS):
            slot = next_slot(lora_indices, row, turn, batch, ROWS)
            _shrink_slot(
                input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K, scaling,
                xm_stride, cm_stride, ROWS, BLOCK_N, BLOCK_K, ONE_STEP, WAIT,
            )  # fmt: skip
    wait_in_one_program(WAIT)


@jit(do_not_specialize=["a_unit"])  # it changes with the layer: compile once
def shrink_slices_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, lora_indices_ptr,
    a_unit, K, SLICES, x_row_stride, out_split_stride, out_slice_stride, out_row_stride,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of slices * max_rank times SPLITS, batch): a group's A is one matrix of slices * rank rows."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices_ptr + row).to(tl.int64)
    if slot < 0:
        wait_in_one_program(WAIT)
        return
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32)  # 64-bit divisions by it would take more registers
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * BLOCK_N
    rows = rank * SLICES - first
    if rows <= 0:
        wait_in_one_program(WAIT)
        return
    share = tl.cdiv(tl.cdiv(K, SPLITS), 16) * 16
    begin = split * share
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = k < tl.minimum(share, K - begin)
    # A multiple of 8 as it is (packed_rank), written so that the compiler sees it and loads whole vectors.
    start = (tl.load(slot_table_ptr + slot * 2) + rank.to(tl.int64) * a_unit) // 8 * 8 + first.to(tl.int64) * K
    place = arena_ptr + start + begin + n[:, None].to(tl.int64) * K + k
    weight = tl.load(place, mask=(n < rows)[:, None] & inside, other=0.0)
    if WAIT == "late":
        gdc_wait()
    x = tl.load(input_ptr + row * x_row_stride + begin + k, mask=inside, other=0.0)
    index = first + n
    target = out_ptr + split * out_split_stride + row * out_row_stride
    target += (index // rank) * out_slice_stride + index % rank
    tl.store(target, tl.sum(weight.to(tl.float32) * x.to(tl.float32), 1), mask=n < rows)

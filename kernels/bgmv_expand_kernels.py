"""The Triton kernels of :mod:`kernels.bgmv_expand`: stacked adapters, and packed slices over a slot table."""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, tl
from kernels.lora_tiles import has_slot, locate_tile, next_slot, wait_in_one_program


@jit
def _expand_slot(
    input_ptr, lora_ptr, out_ptr, lora_indices_ptr, slot, row, batch, count, K,
    xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, ADD_INPUTS: tl.constexpr,
    CAST_TYPE: tl.constexpr, VECTORS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """``count`` rows of B of ``slot`` for each of the ROWS rows that has it; none for -1."""
    if slot >= 0:
        n = tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        place = lora_ptr + n[:, None].to(tl.int64) * lora_k_stride + k * lora_n_stride
        weight = _load_rows(place, n < count, k < K, EVEN_K)
        if WAIT == "late":
            gdc_wait()
        mine = ()
        xs = ()
        for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
            mine += (has_slot(lora_indices_ptr, row, other, batch, slot, ROWS),)
            x = tl.load(input_ptr + other * xm_stride + k * xk_stride, mask=(k < K) & mine[other], other=0.0)
            if not CAST_TYPE:  # the product of two 16-bit floats is exact in fp32
                x = x.to(tl.float32)
            xs += (x,)
        for done in range(0, count, BLOCK_N):
            target = out_ptr + (done + n).to(tl.int64) * cn_stride
            inside = n < count - done
            values = ()
            for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
                if ADD_INPUTS:  # before the products, so that the load is under way meanwhile
                    old = tl.load(target + other * cm_stride, mask=inside & mine[other], other=0.0).to(tl.float32)
                else:
                    old = tl.zeros((BLOCK_N,), dtype=tl.float32)
                values += (old,)
            wide = weight.to(tl.float32)
            place += BLOCK_N * lora_k_stride
            weight = _load_rows(place, n < count - done - BLOCK_N, k < K, EVEN_K)
            for other in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
                products = wide * xs[other]
                if not VECTORS:
                    # Where a thread has one product, it would fuse that, unrounded, into the sum with its neighbours'
                    # rounded ones, and two threads that hold one sum would differ in its last bit.
                    products += 0.0
                total = values[other] + tl.sum(products, 1)
                tl.store(target + other * cm_stride, total.to(out_ptr.dtype.element_ty), mask=inside & mine[other])


@jit(do_not_specialize=["batch"])
def expand_kernel(
    input_ptr, lora_ptr, out_ptr, batch, N, K, lora_indices,
    xm_stride, xk_stride, l0_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_N: tl.constexpr,
    EVEN_K: tl.constexpr, ADD_INPUTS: tl.constexpr, CAST_TYPE: tl.constexpr,
    VECTORS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (SPLIT_N, batch / ROWS). ``lora_k_stride`` steps along hidden and ``lora_n_stride`` along rank, as in LoRAX.

    VECTORS: every row of every adapter starts at a multiple of 16 bytes.
    """
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64) * ROWS
    if VECTORS:  # written so that the compiler sees it
        l0_stride = l0_stride // 8 * 8
        lora_k_stride = lora_k_stride // 8 * 8
    share = tl.cdiv(tl.cdiv(N, SPLIT_N), 16) * 16  # whole vectors, so that stores stay aligned
    start = tl.program_id(0) * share
    count = tl.minimum(N - start, share)  # negative where the shares before cover all of N
    input_ptr += row * xm_stride
    lora_ptr += start.to(tl.int64) * lora_k_stride
    out_ptr += row * cm_stride + start.to(tl.int64) * cn_stride
    if ROWS == 1:
        slot = tl.load(lora_indices + row).to(tl.int64)
        _expand_slot(
            input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K,
            xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
            ROWS, BLOCK_N, BLOCK_K, EVEN_K, ADD_INPUTS, CAST_TYPE, VECTORS, WAIT,
        )  # fmt: skip
    else:
        for turn in range(ROWS):
            slot = next_slot(lora_indices, row, turn, batch, ROWS)
            _expand_slot(
                input_ptr, lora_ptr + slot * l0_stride, out_ptr, lora_indices, slot, row, batch, count, K,
                xm_stride, xk_stride, lora_k_stride, lora_n_stride, cm_stride, cn_stride,
                ROWS, BLOCK_N, BLOCK_K, EVEN_K, ADD_INPUTS, CAST_TYPE, VECTORS, WAIT,
            )  # fmt: skip
    wait_in_one_program(WAIT)


@jit
def _load_rows(place, rows, columns, EVEN_K: tl.constexpr):
    """A tile of weights, zero where ``rows`` or, unless EVEN_K, ``columns`` is false."""
    if EVEN_K:
        return tl.load(place, mask=rows[:, None], other=0.0)
    return tl.load(place, mask=rows[:, None] & columns, other=0.0)


@jit
def _sum_splits(ptr, mask, split_stride, SPLITS: tl.constexpr):
    """The partial sums of the shrink, added in order."""
    total = tl.load(ptr, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(ptr + split * split_stride, mask=mask, other=0.0)
    return total


@jit(do_not_specialize=["b_unit"])  # it changes with the layer: compile once
def expand_slices_kernel(
    input_ptr, arena_ptr, slot_table_ptr, out_ptr, lora_indices_ptr,
    b_unit, n0, n1, n2, n3, x_split_stride, x_slice_stride, x_row_stride, out_row_stride,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ADD_INPUTS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all slices, batch): a narrow slice has only its own tiles."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(lora_indices_ptr + row).to(tl.int64)
    if slot < 0:
        wait_in_one_program(WAIT)
        return
    offset = tl.load(slot_table_ptr + slot * 2)
    # Multiples of 8 as they are (packed_rank), written so that the compiler sees it and loads whole vectors.
    rank = tl.load(slot_table_ptr + slot * 2 + 1).to(tl.int32) // 8 * 8
    index, before, first, rows = locate_tile(tl.program_id(0), n0, n1, n2, n3, BLOCK_N)
    start = (offset + rank.to(tl.int64) * (before + first + b_unit)) // 8 * 8
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < rows
    place = arena_ptr + start + n[:, None] * rank + k
    weight = tl.load(place, mask=inside[:, None] & (k < rank), other=0.0)
    if WAIT == "late":
        gdc_wait()
    target = out_ptr + row * out_row_stride + (before + first) + n
    if ADD_INPUTS:  # before the products, so that the load is under way meanwhile
        values = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.zeros((BLOCK_N,), dtype=tl.float32)
    x_ptr = input_ptr + index.to(tl.int64) * x_slice_stride + row * x_row_stride + k
    values += tl.sum(weight.to(tl.float32) * _sum_splits(x_ptr, k < rank, x_split_stride, SPLITS), 1)
    for step in range(BLOCK_K, rank, BLOCK_K):
        left = step + k < rank
        weight = tl.load(place + step, mask=inside[:, None] & left, other=0.0)
        values += tl.sum(weight.to(tl.float32) * _sum_splits(x_ptr + step, left, x_split_stride, SPLITS), 1)
    tl.store(target, values.to(out_ptr.dtype.element_ty), mask=inside)

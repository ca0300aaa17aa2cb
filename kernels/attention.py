"""Attention over a paged KV cache: a varlen prefill over a cached prefix, and split-KV decode.

Shapes, in both functions:

- ``key_cache``, ``value_cache``: (pages, page_size, kv_heads, head_dim), last dim contiguous, strides equal;
- ``page_table``: (rows, max_pages) int32; entry j of a row is the page of its positions
  ``j * page_size .. (j + 1) * page_size - 1``;
- ``context_lens``: (rows,) int32, cached positions including this step's;
- ``q``, ``out``: (tokens, heads, head_dim), fp32, bf16 or fp16, last dim contiguous. Other strides are free, so
  ``q`` may be a view into a packed q|k|v row. ``heads`` is a multiple of ``kv_heads``, by any factor;
- ``scale``: factor of the scores before the softmax, positive.

Lengths and page tables are read on the device and launches are sized from shapes alone, so both calls can be
captured in a CUDA graph. Page-table entries, page tails and pages that no query may see are never read into the
arithmetic: they may hold NaN. Softmax and sums are fp32.

The kernels follow FlashAttention-2 (Dao 2023) and its split-KV decoding, over pages as in PagedAttention
(Kwon et al. 2023). Keys are walked in blocks that begin at multiples of the block size, and a block that a query
may not see changes no bit of its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels import reference_attention
from kernels.attention_kernels import combine_kernel, decode_kernel, prefill_kernel
from kernels.dispatch import interpreter_on, launchable, overlap, triton, use_triton

_LOG2_E = 1.4426950408889634
# One row of 32768 keys takes 55.8, 54.3, 58.1 and 57.5 us with at most 16, 32, 64 and 128 splits, 64 rows of 4096 keys
# 391, 393, 395 and 398 us (one NVIDIA H100 80GB HBM3, tiles of 64 keys).
_MAX_SPLITS = 32
_KEYS_PER_SPLIT = 256  # a multiple of every key block


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel cuts its work.

    keys: keys a block. warps, stages: Triton's. queries: (query, head) pairs a tile, of prefill. workers: programs
    a multiprocessor that decode launches, at most.
    """

    keys: int
    warps: int
    stages: int
    queries: int = 0
    workers: int = 0


def decode_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of ``paged_decode``: a matter of dtype and head_dim alone, as the bits of a result follow from them.

    16 bits, 128 dimensions: one row of 32768 keys takes 53.1 us, against 53.9 with (64 keys, 8 warps, 3 stages, x2); 64
    rows of 4096 keys 391 and 390 us (one NVIDIA H100 80GB HBM3). In another run, with 64 splits at most, one row took
    54.7 us, against 58.1 with (64, 4, 3, x3) and 60.0 with (128, 8, 3, x1). Four programs of this size fill a
    multiprocessor's shared memory.
    """
    if dtype is torch.float32:
        return Tiles(keys=32 if head_dim <= 64 else 16, warps=8, stages=2, workers=2)
    if head_dim <= 128:
        return Tiles(keys=32, warps=4, stages=4, workers=4)
    return Tiles(keys=32, warps=4, stages=3, workers=2)


def prefill_tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of ``paged_prefill``: the widest that spill no register on sm_90.

    16 bits, 128 dimensions: 105, 1343 and 405 us for prompts of 1 x 2048, 1 x 8192 and 4 x 2048 tokens, against 103,
    1392 and 402 with 64 queries, 4 warps and 2 stages (one NVIDIA H100 80GB HBM3; torch's FA2 takes 173, 1702 and 488).

    fp32 runs on the plain arithmetic units, where each thread holds whole rows of its operands.
    """
    if dtype is torch.float32:
        return Tiles(queries=32, keys=32 if head_dim <= 64 else 16, warps=8, stages=2)
    if head_dim <= 128:
        return Tiles(queries=128, keys=64, warps=8, stages=3)
    return Tiles(queries=128, keys=32, warps=8, stages=3)


def default_splits(max_pages: int, page_size: int) -> int:
    """Most pieces that decode cuts a row's keys into, for a page table of ``max_pages`` columns: 1 to 32.

    Pieces hold 256 keys, or a 32nd of the row's keys where that is more. So how a row is cut, and with it every bit
    of its result, follows from its own length: not from the batch, nor from the table's width, which only decides
    how many pieces there is room for.
    """
    return max(1, min(_MAX_SPLITS, -(-max_pages * page_size // _KEYS_PER_SPLIT)))


def paged_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int = 0,
    num_splits: int | None = None,
) -> None:
    """One query per row, at the row's last position: ``out[i] = softmax(scale * q[i] @ K_i.T) @ V_i``.

    q, out: (rows, heads, head_dim). A row of ``context_lens`` 0 is padding: its output is zeros.
    sliding_window: w > 0 lets a query at position p see p - w + 1 .. p; 0 lets it see all.
    num_splits: equal pieces that each row's keys are cut into, worked on at once; None cuts by the row's own length
    (``default_splits``), so that a row's bits depend on nothing else.

    Raises ValueError when shapes or strides do not fit together.
    """
    _check(q, key_cache, value_cache, page_table, context_lens, out, scale)
    if q.shape[0] != context_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but context_lens {context_lens.shape[0]}; decode takes one per row")
    rows, heads, head_dim = q.shape
    page_size, kv_heads = key_cache.shape[1:3]
    room = default_splits(page_table.shape[1], page_size) if num_splits is None else num_splits
    if room < 1:
        raise ValueError(f"num_splits is {num_splits} but must be 1 or more, or None to choose")
    if not use_triton(q):
        reference_attention.paged_decode(
            q, key_cache, value_cache, page_table, context_lens, out, scale, sliding_window, num_splits
        )
        return
    if rows == 0:
        return
    group = heads // kv_heads
    block_d = triton.next_power_of_2(head_dim)
    tiles = decode_tiles(q.dtype, head_dim)
    most, min_blocks = (_MAX_SPLITS, _KEYS_PER_SPLIT // tiles.keys) if num_splits is None else (num_splits, 1)
    # Rows of one split write to out at once and need no scratch.
    scratch = (rows, heads, room) if room > 1 else (0, 0, 0)
    sums = torch.empty((*scratch, head_dim), dtype=torch.float32, device=q.device)
    peaks = torch.empty(scratch, dtype=torch.float32, device=q.device)
    masses = torch.empty(scratch, dtype=torch.float32, device=q.device)
    workers = min(rows * kv_heads * room, tiles.workers * _multiprocessors(q.device))
    # Launched plainly: overlapped with the kernels before them both took 54.1 us in place of 53.1 for one row of 32768
    # keys and 426 in place of 391 for 64 of 4096, and 0.3 to 0.5 us less for rows of 256 (one NVIDIA H100 80GB HBM3).
    launchable(decode_kernel, q)[(workers,)](
        q,
        key_cache,
        value_cache,
        page_table,
        context_lens,
        out,
        sums,
        peaks,
        masses,
        *q.stride()[:2],
        *key_cache.stride()[:3],
        page_table.stride(0),
        *out.stride()[:2],
        rows,
        room,
        most,
        min_blocks,
        scale * _LOG2_E,
        GROUP=group,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        BLOCK_R=_row_block(rows),
        BLOCK_M=max(16, triton.next_power_of_2(group)),  # tensor cores take 16 rows at least
        BLOCK_N=tiles.keys,
        BLOCK_D=block_d,
        WIDEN=_widen(q),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if room > 1:
        launchable(combine_kernel, q)[(heads, rows)](
            sums,
            peaks,
            masses,
            context_lens,
            out,
            *out.stride()[:2],
            room,
            most,
            min_blocks,
            HEAD_DIM=head_dim,
            WINDOW=sliding_window,
            BLOCK_N=tiles.keys,
            BLOCK_S=max(_MAX_SPLITS, triton.next_power_of_2(room)),  # one order of summing whatever the splits
            BLOCK_D=block_d,
            num_warps=4,  # with 8, 53.6 us for one row of 32768 keys and 404 for 64 of 4096
        )


def paged_prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
    max_query_len: int,
    sliding_window: int = 0,
) -> None:
    """Many queries per row, causal: row i's queries are the last of its ``context_lens[i]`` positions.

    q, out: (tokens, heads, head_dim). query_starts: (rows + 1,) int32, absolute: row i's queries are tokens
    ``query_starts[i] .. query_starts[i + 1] - 1`` of q; tokens in no row are neither read nor written.
    max_query_len: at least the longest row's queries (sizes the launch).
    sliding_window: as in ``paged_decode``.

    A query's result does not depend on how its prompt was cut into chunks, up to fp32 rounding.
    Raises ValueError when shapes or strides do not fit together.
    """
    _check(q, key_cache, value_cache, page_table, context_lens, out, scale)
    if query_starts.shape[0] != context_lens.shape[0] + 1:
        raise ValueError(
            f"query_starts has {query_starts.shape[0]} entries but must have rows + 1 = {context_lens.shape[0] + 1}"
        )
    tokens, heads, head_dim = q.shape
    rows = context_lens.shape[0]
    page_size, kv_heads = key_cache.shape[1:3]
    if not use_triton(q):
        reference_attention.paged_prefill(
            q,
            key_cache,
            value_cache,
            page_table,
            query_starts,
            context_lens,
            out,
            scale,
            max_query_len,
            sliding_window,
        )
        return
    if rows == 0 or max_query_len == 0:
        return
    group = heads // kv_heads
    tiles = prefill_tiles(q.dtype, head_dim)
    # Tiles that the rows can have between them: each row ends in the middle of one.
    places = min(rows * triton.cdiv(max_query_len * group, tiles.queries), tokens * group // tiles.queries + rows)
    launchable(prefill_kernel, q)[(kv_heads * places,)](
        q,
        key_cache,
        value_cache,
        page_table,
        query_starts,
        context_lens,
        out,
        *q.stride()[:2],
        *key_cache.stride()[:3],
        page_table.stride(0),
        *out.stride()[:2],
        rows,
        scale * _LOG2_E,
        GROUP=group,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        BLOCK_R=_row_block(rows),
        BLOCK_M=tiles.queries,
        BLOCK_N=tiles.keys,
        BLOCK_D=triton.next_power_of_2(head_dim),
        WIDEN=_widen(q),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(q),
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter's programs run one after the other, so a few will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _row_block(rows: int) -> int:
    return max(32, int(triton.next_power_of_2(rows)))  # one compiled kernel for all small batches


def _widen(q: Tensor) -> bool:
    return q.dtype is torch.bfloat16 and interpreter_on()


def _check(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads = key_cache.shape[2]
    if key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} must be equal in shape "
            f"and end in q's head_dim, {head_dim}"
        )
    if key_cache.stride() != value_cache.stride():
        raise ValueError(
            f"key_cache has strides {key_cache.stride()} and value_cache {value_cache.stride()}: they must be equal"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    if out.shape != q.shape:
        raise ValueError(f"out {tuple(out.shape)} must have q's shape, {tuple(q.shape)}")
    if page_table.shape[0] != context_lens.shape[0]:
        raise ValueError(f"page_table has {page_table.shape[0]} rows but context_lens {context_lens.shape[0]}")
    if q.dtype != key_cache.dtype or q.dtype != value_cache.dtype:
        raise ValueError(
            f"q is {q.dtype}, the caches {key_cache.dtype} and {value_cache.dtype}: they must be one dtype"
        )
    if not scale > 0:
        raise ValueError(f"scale is {scale} but must be positive")
    for name, tensor in (
        ("q", q),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("page_table", page_table),
        ("context_lens", context_lens),
        ("out", out),
    ):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dim, which must be contiguous")

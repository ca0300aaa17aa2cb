"""Attention over a paged KV cache: a varlen prefill over a cached prefix, and split-KV decode.

Shapes, in both functions:

- ``key_cache``, ``value_cache``: (pages, page_size, kv_heads, head_dim), last dim contiguous;
- ``page_table``: (rows, max_pages) int32; entry j of a row is the page of its positions
  ``j * page_size .. (j + 1) * page_size - 1``;
- ``context_lens``: (rows,) int32, cached positions including this step's;
- ``q``, ``out``: (tokens, heads, head_dim), fp32, bf16 or fp16, last dim contiguous. Other strides are free, so
  ``q`` may be a view into a packed q|k|v row. ``heads`` is a multiple of ``kv_heads``, by any factor.

Lengths and page tables are read on the device and launches are sized from shapes alone, so both calls can be
captured in a CUDA graph. Page-table entries, page tails and pages that no query may see are never read into the
arithmetic: they may hold NaN. Softmax and sums are fp32.

The kernels follow FlashAttention-2 (Dao 2023) and its split-KV decoding, over pages as in PagedAttention
(Kwon et al. 2023). Keys are walked in blocks that begin at multiples of the block size, and a block that a query
may not see changes no bit of its result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference_attention
from kernels.attention_kernels import combine_kernel, decode_kernel, prefill_kernel
from kernels.dispatch import interpreter_on, launchable, triton, use_triton

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 16
_KEYS_PER_SPLIT = 256  # a multiple of every key block


def default_splits(max_pages: int, page_size: int) -> int:
    """Most pieces that decode cuts a row's keys into, for a page table of ``max_pages`` columns: 1 to 16.

    Pieces hold 256 keys, or a 16th of the row's keys where that is more. So how a row is cut, and with it every bit
    of its result, follows from its own length: not from the batch, nor from the table's width, which only decides
    how many pieces the launch has room for. Pieces that a short row leaves empty end at once.
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
    _check(q, key_cache, value_cache, page_table, context_lens, out)
    if q.shape[0] != context_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but context_lens {context_lens.shape[0]}; decode takes one per row")
    rows, heads, head_dim = q.shape
    page_size, kv_heads = key_cache.shape[1:3]
    splits = default_splits(page_table.shape[1], page_size) if num_splits is None else num_splits
    if splits < 1:
        raise ValueError(f"num_splits is {num_splits} but must be 1 or more, or None to choose")
    if not use_triton(q):
        reference_attention.paged_decode(
            q, key_cache, value_cache, page_table, context_lens, out, scale, sliding_window, splits
        )
        return
    if rows == 0:
        return
    group = heads // kv_heads
    block_d = triton.next_power_of_2(head_dim)
    block_n, warps = _key_block(q)
    min_blocks = _KEYS_PER_SPLIT // block_n if num_splits is None else 1
    # One split writes to out at once and needs no scratch.
    scratch = (rows, heads, splits) if splits > 1 else (0, 0, 0)
    sums = torch.empty((*scratch, head_dim), dtype=torch.float32, device=q.device)
    peaks = torch.empty(scratch, dtype=torch.float32, device=q.device)
    masses = torch.empty(scratch, dtype=torch.float32, device=q.device)
    launchable(decode_kernel, q)[(splits, kv_heads, rows)](
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
        *value_cache.stride()[:3],
        page_table.stride(0),
        *out.stride()[:2],
        scale * _LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        SPLITS=splits,
        MIN_BLOCKS=min_blocks,
        BLOCK_M=max(16, triton.next_power_of_2(group)),  # tensor cores take 16 rows at least
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        WIDEN=_widen(q),
        num_warps=warps,
        num_stages=2,
    )
    if splits > 1:
        launchable(combine_kernel, q)[(heads, rows)](
            sums,
            peaks,
            masses,
            context_lens,
            out,
            *out.stride()[:2],
            HEAD_DIM=head_dim,
            WINDOW=sliding_window,
            SPLITS=splits,
            MIN_BLOCKS=min_blocks,
            BLOCK_N=block_n,
            BLOCK_S=max(_MAX_SPLITS, triton.next_power_of_2(splits)),  # one order of summing whatever the splits
            BLOCK_D=block_d,
            num_warps=4,
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
    _check(q, key_cache, value_cache, page_table, context_lens, out)
    if query_starts.shape[0] != context_lens.shape[0] + 1:
        raise ValueError(
            f"query_starts has {query_starts.shape[0]} entries but must have rows + 1 = {context_lens.shape[0] + 1}"
        )
    rows, heads = context_lens.shape[0], q.shape[1]
    page_size, kv_heads, head_dim = key_cache.shape[1:]
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
    block_d = triton.next_power_of_2(head_dim)
    block_m = 32 if q.dtype is torch.float32 else 64
    block_n, warps = _key_block(q)
    launchable(prefill_kernel, q)[(triton.cdiv(max_query_len * group, block_m), rows, kv_heads)](
        q,
        key_cache,
        value_cache,
        page_table,
        query_starts,
        context_lens,
        out,
        *q.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        page_table.stride(0),
        *out.stride()[:2],
        scale * _LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        WINDOW=sliding_window,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        WIDEN=_widen(q),
        num_warps=warps,
        num_stages=2,
    )


def _key_block(q: Tensor) -> tuple[int, int]:
    """(keys per block, warps) for q's dtype and head_dim: the widest block that spills no register on sm_90.

    fp32 runs on the plain arithmetic units, where each thread holds whole rows of its operands.
    """
    head_dim = q.shape[-1]
    if q.dtype is torch.float32:
        return (32 if head_dim <= 64 else 16), 8
    return (64 if head_dim <= 128 else 32), 4


def _widen(q: Tensor) -> bool:
    return q.dtype is torch.bfloat16 and interpreter_on()


def _check(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, page_table: Tensor, context_lens: Tensor, out: Tensor
) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads = key_cache.shape[2]
    if key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
        raise ValueError(
            f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} must be equal in shape "
            f"and end in q's head_dim, {head_dim}"
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

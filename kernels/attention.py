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
(Kwon et al. 2023).
"""

from __future__ import annotations

from torch import Tensor

from kernels import reference_attention


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
    num_splits: pieces that each row's keys are cut into, worked on at once; None chooses from the page capacity
    of the table alone (``kernels.attention.default_splits``), so a row's bits do not depend on the batch.

    Raises ValueError when shapes or strides do not fit together.
    """
    _check(q, key_cache, value_cache, page_table, context_lens, out)
    if q.shape[0] != context_lens.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but context_lens {context_lens.shape[0]}; decode takes one per row")
    reference_attention.paged_decode(
        q, key_cache, value_cache, page_table, context_lens, out, scale, sliding_window, num_splits
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
    for name, tensor in (("q", q), ("key_cache", key_cache), ("value_cache", value_cache), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in head_dim; pass one with a contiguous last dim")

"""Paged attention in plain torch: what serves CPU tensors, and the plain-language twin of the Triton kernels.

Every row is computed alone, from shapes that only its own length decides, so its bits do not depend on who
shares the batch. The query is scaled into a fresh tensor and keys are gathered into fresh tensors: matrix
products then always see equally aligned memory, which some BLAS libraries need to give equal bits.
All arithmetic is fp32; the result is rounded once, to the dtype of ``out``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Queries that one score matrix covers: bounds the scratch of a long chunk to heads * 256 * context floats.
QUERY_BLOCK = 256


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
    """See ``kernels.attention.paged_decode``. ``num_splits`` only divides work, so it is ignored here."""
    for row, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            out[row].zero_()
            continue
        first = max(0, context_len - sliding_window) if sliding_window else 0
        keys, values = _gather(key_cache, value_cache, page_table[row], first, context_len)
        _attend(q[row : row + 1], keys, values, out[row : row + 1], scale)


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
    """See ``kernels.attention.paged_prefill``. ``max_query_len`` only sizes a launch, so it is ignored here."""
    starts = query_starts.tolist()
    for row, context_len in enumerate(context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        cached = context_len - (end - begin)
        for block in range(begin, end, QUERY_BLOCK):
            block_end = min(block + QUERY_BLOCK, end)
            first_position = cached + block - begin
            key_end = cached + block_end - begin
            first_key = max(0, first_position - sliding_window + 1) if sliding_window else 0
            keys, values = _gather(key_cache, value_cache, page_table[row], first_key, key_end)
            positions = torch.arange(first_position, key_end, device=q.device)[:, None]
            key_positions = torch.arange(first_key, key_end, device=q.device)[None, :]
            hidden = key_positions > positions
            if sliding_window:
                hidden |= key_positions <= positions - sliding_window
            _attend(q[block:block_end], keys, values, out[block:block_end], scale, hidden)


def _gather(key_cache: Tensor, value_cache: Tensor, pages: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values of positions ``first .. end - 1`` of one row, each (kv_heads, end - first, head_dim) fp32.

    Only the pages that hold these positions are looked up, and a page's tail is cut off before any arithmetic.
    """
    page_size = key_cache.shape[1]
    first_page = first // page_size
    used = pages[first_page : (end + page_size - 1) // page_size]
    low, high = first - first_page * page_size, end - first_page * page_size
    keys = key_cache.index_select(0, used).flatten(0, 1)[low:high]
    values = value_cache.index_select(0, used).flatten(0, 1)[low:high]
    return (
        keys.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True),
        values.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True),
    )


def _attend(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, hidden: Tensor | None = None) -> None:
    """Softmax attention of q (queries, heads, head_dim) over (kv_heads, keys, head_dim), written to ``out``.

    ``hidden``: (queries, keys) bool, True where a query must not look.
    """
    queries, heads, head_dim = q.shape
    kv_heads, num_keys, _ = keys.shape
    group = heads // kv_heads
    scaled = q.to(torch.float32) * scale
    # (kv_heads, group * queries, head_dim): the heads that share a key head become rows of one matrix product.
    packed = scaled.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    scores = torch.bmm(packed, keys.transpose(1, 2))
    if hidden is not None:
        scores.view(kv_heads, group, queries, num_keys).masked_fill_(hidden, float("-inf"))
    mixed = torch.bmm(torch.softmax(scores, dim=-1), values)
    out.copy_(mixed.view(kv_heads, group, queries, head_dim).permute(2, 0, 1, 3).reshape(queries, heads, head_dim))

"""The Triton kernels of ``kernels.fused``, which says what they compute and launches them.

Strides are in elements, offsets int64. Every product is taken in fp32 and rounded explicitly, so that no compiler
fuses two steps between which Hugging Face's modules round. All loads come before the first store: none may wait for
it. WAIT: as ``kernels.dispatch.overlap`` says.
"""

from __future__ import annotations

from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, tl


@jit
def residual_rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    x_token,
    residual_token,
    out_token,
    eps,
    HIDDEN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (tokens,). The weight alone may be read before the wait."""
    if WAIT != "never":
        gdc_launch_dependents()
    if WAIT == "first":
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if WAIT == "late":
        gdc_wait()
    hidden = tl.load(x + token * x_token + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        place = residual + token * residual_token + columns
        before = tl.load(place, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + before.to(tl.float32)).to(before.dtype)
        tl.store(place, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)).to(hidden.dtype)
    tl.store(
        out + token * out_token + columns,
        (scale.to(tl.float32) * normed.to(tl.float32)).to(out.dtype.element_ty),
        mask=inside,
    )


@jit
def rope_write_kv_kernel(
    qkv,
    cos_sin,
    positions,
    kv_slots,
    key_cache,
    value_cache,
    q_weight,
    k_weight,
    qkv_token,
    table_row,
    cache_page,
    cache_slot,
    cache_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (tokens * blocks,): BLOCK_H of a token's q|k|v heads; v heads are carried through."""
    if WAIT == "first":
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (HEADS + 2 * KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    half = tl.arange(0, BLOCK_HALF)
    HALF: tl.constexpr = HEAD_DIM // 2
    inside = half < HALF
    place = qkv + token * qkv_token + (head * HEAD_DIM)[:, None] + half[None, :]
    exists = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    dtype = qkv.dtype.element_ty
    slot = tl.load(kv_slots + token)
    angles = cos_sin + tl.load(positions + token) * table_row + half
    old_low = tl.load(place, mask=exists, other=0.0)
    old_high = tl.load(place + HALF, mask=exists, other=0.0)
    cos = tl.load(angles, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin = tl.load(angles + HALF, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    low = old_low.to(tl.float32)
    high = old_high.to(tl.float32)
    is_query = (head < HEADS)[:, None]
    if NORM:
        spread = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        q_low = tl.load(q_weight + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_high = tl.load(q_weight + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_low = tl.load(k_weight + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_high = tl.load(k_weight + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
        low = (low * spread).to(dtype).to(tl.float32) * tl.where(is_query, q_low, k_low)
        high = (high * spread).to(dtype).to(tl.float32) * tl.where(is_query, q_high, k_high)
        low = low.to(dtype).to(tl.float32)
        high = high.to(dtype).to(tl.float32)
    new_low = ((low * cos).to(dtype).to(tl.float32) - (high * sin).to(dtype).to(tl.float32)).to(dtype)
    new_high = ((high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)).to(dtype)
    tl.store(place, new_low, mask=is_query & exists)
    tl.store(place + HALF, new_high, mask=is_query & exists)
    written = exists & (slot >= 0)
    cached = slot // PAGE_SIZE * cache_page + slot % PAGE_SIZE * cache_slot
    is_key = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & written
    key_place = key_cache + cached + ((head - HEADS) * cache_head)[:, None] + half[None, :]
    tl.store(key_place, new_low.to(key_cache.dtype.element_ty), mask=is_key)
    tl.store(key_place + HALF, new_high.to(key_cache.dtype.element_ty), mask=is_key)
    is_value = (head >= HEADS + KV_HEADS)[:, None] & written
    value_place = value_cache + cached + ((head - HEADS - KV_HEADS) * cache_head)[:, None] + half[None, :]
    tl.store(value_place, old_low.to(value_cache.dtype.element_ty), mask=is_value)
    tl.store(value_place + HALF, old_high.to(value_cache.dtype.element_ty), mask=is_value)


@jit
def silu_mul_kernel(
    gate_up, out, gate_up_token, out_token, INTER: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr
):
    """Grid (tokens * blocks of columns,)."""
    if WAIT == "first":
        gdc_launch_dependents()
        gdc_wait()
    BLOCKS: tl.constexpr = (INTER + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    columns = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INTER
    place = gate_up + token * gate_up_token + columns
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + INTER, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * out_token + columns, result, mask=inside)

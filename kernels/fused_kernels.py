"""The Triton kernels of ``kernels.fused``, which says what they compute and launches them.

Strides are in elements, offsets int64. Every product is taken in fp32 and rounded explicitly, so that no compiler
fuses two steps between which Hugging Face's modules round.
"""

from __future__ import annotations

from kernels.dispatch import jit, tl


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
):
    """Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(x + token * x_token + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        place = residual + token * residual_token + columns
        before = tl.load(place, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + before.to(tl.float32)).to(before.dtype)
        tl.store(place, hidden, mask=inside)
    wide = hidden.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)).to(hidden.dtype)
    tl.store(out + token * out_token + columns, (scale * normed.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


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
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Grid (tokens, blocks of BLOCK_H heads). Query heads come first, then key heads, which take their value along."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half = tl.arange(0, BLOCK_HALF)
    HALF: tl.constexpr = HEAD_DIM // 2
    inside = half < HALF
    is_query = (head < HEADS)[:, None] & inside[None, :]
    is_key = ((head >= HEADS) & (head < HEADS + KV_HEADS))[:, None] & inside[None, :]
    place = qkv + token * qkv_token + (head * HEAD_DIM)[:, None] + half[None, :]
    dtype = qkv.dtype.element_ty
    low = tl.load(place, mask=is_query | is_key, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=is_query | is_key, other=0.0).to(tl.float32)
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
    angles = cos_sin + tl.load(positions + token) * table_row + half
    cos = tl.load(angles, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin = tl.load(angles + HALF, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    new_low = ((low * cos).to(dtype).to(tl.float32) - (high * sin).to(dtype).to(tl.float32)).to(dtype)
    new_high = ((high * cos).to(dtype).to(tl.float32) + (low * sin).to(dtype).to(tl.float32)).to(dtype)
    tl.store(place, new_low, mask=is_query)
    tl.store(place + HALF, new_high, mask=is_query)
    slot = tl.load(kv_slots + token)
    is_key = is_key & (slot >= 0)
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    kv_head = (head - HEADS)[:, None]
    key_place = key_cache + page * k_page + offset * k_slot + kv_head * k_head + half[None, :]
    tl.store(key_place, new_low.to(key_cache.dtype.element_ty), mask=is_key)
    tl.store(key_place + HALF, new_high.to(key_cache.dtype.element_ty), mask=is_key)
    value = place + KV_HEADS * HEAD_DIM
    value_place = value_cache + page * v_page + offset * v_slot + kv_head * v_head + half[None, :]
    tl.store(value_place, tl.load(value, mask=is_key, other=0.0).to(value_cache.dtype.element_ty), mask=is_key)
    value_high = tl.load(value + HALF, mask=is_key, other=0.0)
    tl.store(value_place + HALF, value_high.to(value_cache.dtype.element_ty), mask=is_key)


@jit
def silu_mul_kernel(gate_up, out, gate_up_token, out_token, INTER: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INTER
    place = gate_up + token * gate_up_token + columns
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + INTER, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    result = (active * up.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * out_token + columns, result, mask=inside)

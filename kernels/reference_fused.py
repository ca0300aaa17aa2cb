"""The fused elementwise steps in plain torch: what serves CPU tensors, and the twin of the Triton kernels.

Rounding follows Hugging Face's modules step by step (see ``kernels.fused``), so bf16 results agree with theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """See ``kernels.fused.residual_rms_norm``."""
    if residual is not None:
        residual.add_(x)
        x = residual
    out.copy_(_rms_norm(x, weight, eps))


def rope_write_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See ``kernels.fused.rope_write_kv``."""
    page_size, kv_heads, head_dim = key_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
    table = cos_sin[positions].to(qkv.dtype)[:, None, :]
    cos, sin = table[..., : head_dim // 2], table[..., head_dim // 2 :]
    q.copy_(_rotate(q if q_weight is None else _rms_norm(q, q_weight, eps), cos, sin))
    k = _rotate(k if k_weight is None else _rms_norm(k, k_weight, eps), cos, sin)
    keep = kv_slots >= 0
    if not bool(keep.all()):
        kv_slots, k, v = kv_slots[keep], k[keep], v[keep]
    page, offset = kv_slots // page_size, kv_slots % page_size
    key_cache[page, offset] = k.to(key_cache.dtype)
    value_cache[page, offset] = v.to(value_cache.dtype)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See ``kernels.fused.silu_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    # exp, not torch's silu: its vector and scalar paths differ in the last bit, so a row's bits would depend on
    # where the row happens to lie in the batch.
    torch.mul((wide / (1.0 + torch.exp(-wide))).to(gate.dtype), up, out=out)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

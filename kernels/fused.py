"""The elementwise steps between a decoder's matrix products, one launch each.

Rounding follows Hugging Face's modules, so 16-bit results agree with theirs to the last bits:

- RMSNorm: statistics and normalising in fp32, rounded to the activations' dtype, then times the weight;
- rotary embedding: cos and sin rounded to the activations' dtype, each product and the sum rounded to it;
- SiLU: computed in fp32, rounded to the activations' dtype, then times ``up``.

RMSNorm: Zhang and Sennrich 2019. Rotary embedding: Su et al. 2021, in the half-split form of GPT-NeoX.
"""

from __future__ import annotations

from torch import Tensor

from kernels import reference_fused
from kernels.dispatch import launchable, overlap, triton, use_triton
from kernels.fused_kernels import residual_rms_norm_kernel, rope_write_kv_kernel, silu_mul_kernel


def residual_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    operands_ready: bool = False,
) -> None:
    """``residual += x`` in place when given, then ``out = rms_norm(residual or x) * weight``.

    x, residual, out: (tokens, hidden), last dim contiguous; out may be x. weight: (hidden,).
    operands_ready: no kernel that may still be running when this one is launched writes ``weight``. A GPU of compute
    capability 9.0 or later then loads it while the kernel before this one in the stream finishes.
    Raises ValueError when shapes or strides do not fit together.
    """
    named = [("x", x), ("out", out)] if residual is None else [("x", x), ("residual", residual), ("out", out)]
    for name, tensor in named:
        if tensor.shape != x.shape or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()}; it must be {tuple(x.shape)} with a "
                "contiguous last dim"
            )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)} but must be ({x.shape[-1]},)")
    if not use_triton(x):
        reference_fused.residual_rms_norm(x, residual, weight, eps, out)
        return
    tokens, hidden = x.shape
    if tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    launchable(residual_rms_norm_kernel, x)[(tokens,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        eps,
        HIDDEN=hidden,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=norm_warps(hidden),
        **overlap(x, operands_ready),
    )


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
    """Rotate q in place; write the rotated k, and v, to the cache. k and v inside ``qkv`` stay as they are.

    qkv: (tokens, (num_heads + 2 * kv_heads) * head_dim), packed q|k|v, last dim contiguous.
    cos_sin: (max_positions, head_dim) fp32, cosines then sines, head_dim / 2 of each.
    positions: (tokens,) int64, rows of cos_sin.
    kv_slots: (tokens,) int64, ``page * page_size + offset``; -1 writes nothing.
    key_cache, value_cache: (pages, page_size, kv_heads, head_dim), last dim contiguous, strides equal.
    q_weight, k_weight: (head_dim,), both or neither: an RMSNorm of every q and k head before the rotation (Qwen3).
    eps: of that norm.
    Raises ValueError when shapes or strides do not fit together.
    """
    tokens = qkv.shape[0]
    kv_heads, head_dim = key_cache.shape[2:]
    if qkv.shape[1] != (num_heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} with strides {qkv.stride()}; {num_heads} + 2 * {kv_heads} heads of {head_dim} "
            f"need {(num_heads + 2 * kv_heads) * head_dim} contiguous columns"
        )
    if head_dim % 2 or cos_sin.shape[1] != head_dim:
        raise ValueError(f"cos_sin has {cos_sin.shape[1]} columns; it needs head_dim, {head_dim}, an even number")
    if positions.shape != (tokens,) or kv_slots.shape != (tokens,):
        raise ValueError(f"positions {tuple(positions.shape)}, kv_slots {tuple(kv_slots.shape)}: each must be {tokens}")
    if key_cache.shape != value_cache.shape or key_cache.stride() != value_cache.stride() or key_cache.stride(-1) != 1:
        raise ValueError("key_cache and value_cache must be equal in shape and strides, with a contiguous last dim")
    if (q_weight is None) != (k_weight is None):
        raise ValueError("pass q_weight and k_weight together, or neither")
    if not use_triton(qkv):
        reference_fused.rope_write_kv(
            qkv, cos_sin, positions, kv_slots, key_cache, value_cache, num_heads, q_weight, k_weight, eps
        )
        return
    if tokens == 0:
        return
    block_h, warps = rope_block(num_heads + 2 * kv_heads)
    launchable(rope_write_kv_kernel, qkv)[(tokens * triton.cdiv(num_heads + 2 * kv_heads, block_h),)](
        qkv,
        cos_sin,
        positions,
        kv_slots,
        key_cache,
        value_cache,
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        qkv.stride(0),
        cos_sin.stride(0),
        *key_cache.stride()[:3],
        eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=key_cache.shape[1],
        NORM=q_weight is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=warps,
        enable_fp_fusion=False,  # a fused multiply-add would skip the rounding of the product
        **overlap(qkv),
    )


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """``out = silu(gate) * up``. gate_up: (tokens, 2 * inter), gate|up; out: (tokens, inter).

    Raises ValueError when shapes or strides do not fit together.
    """
    tokens, width = gate_up.shape
    if out.shape != (tokens, width // 2) or width % 2:
        raise ValueError(f"out is {tuple(out.shape)} but gate_up {tuple(gate_up.shape)} needs ({tokens}, {width // 2})")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"strides {gate_up.stride()} and {out.stride()}: the last dim must be contiguous")
    if not use_triton(gate_up):
        reference_fused.silu_mul(gate_up, out)
        return
    inter = width // 2
    if tokens == 0:
        return
    block, warps = silu_block(inter)
    launchable(silu_mul_kernel, gate_up)[(tokens * triton.cdiv(inter, block),)](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        INTER=inter,
        BLOCK=block,
        num_warps=warps,
        **overlap(gate_up),
    )


# Launch sizes follow from widths alone. The order of a sum, and so its bits, would change with them.


def norm_warps(hidden: int) -> int:
    """Warps of ``residual_rms_norm``: of 16 bits, four 16-byte loads a thread and tensor.

    4, 8 and 16 of them are within 5 % of each other: at a hidden size of 4096, 1.93, 1.94 and 2.02 us for 64 tokens and
    47.8, 47.8 and 48.0 for 4096 (one NVIDIA H100 80GB HBM3).
    """
    return int(min(16, max(1, triton.next_power_of_2(hidden) // 1024)))


def rope_block(heads: int) -> tuple[int, int]:
    """(heads, warps) a program of ``rope_write_kv``.

    32 + 2 * 8 heads of 128: 1.56, 1.87 and 40.1 us for 1, 64 and 4096 tokens; (8, 4) takes 1.56, 1.90 and 40.0, (16, 4)
    1.62, 1.97 and 38.3, (64, 8) 1.76, 1.98 and 38.9 (one NVIDIA H100 80GB HBM3).
    """
    return int(min(16, triton.next_power_of_2(heads))), 8


def silu_block(inter: int) -> tuple[int, int]:
    """(columns, warps) a program of ``silu_mul``.

    14336 columns: 1.39, 2.16 and 119 us for 1, 64 and 4096 tokens; (512, 2) takes 1.39, 4.62 and 118, (2048, 8) 1.45,
    2.32 and 118 (one NVIDIA H100 80GB HBM3).
    """
    return int(min(1024, triton.next_power_of_2(inter))), 4

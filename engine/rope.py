"""Rotary position embedding tables for the rope types of the supported models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.spec import ModelSpec, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequency of each rotated pair, and the factor on cos and sin.

    Returns ``(head_dim // 2,)`` fp32 on the CPU in radians per position, and the attention factor (1.0 except
    for yarn). Same arithmetic as transformers' ``ROPE_INIT_FUNCTIONS``.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**exponents
    plain = 1.0 / periods
    if rope.type == "default":
        return plain, 1.0
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(plain, rope), 1.0
    assert rope.type == "yarn", rope.type
    return _yarn(periods, rope, head_dim), _yarn_attention_factor(rope)


def cos_sin_table(spec: ModelSpec, max_positions: int, device: torch.device | str) -> Tensor:
    """Cosines and sines of every position, computed on the CPU so that all devices hold the same bits.

    Returns ``(max_positions, head_dim)`` fp32 on ``device``: the first half of a row is cos, the second sin,
    each ``head_dim // 2`` wide and multiplied by the attention factor.
    """
    frequencies, attention_factor = inverse_frequencies(spec.rope, spec.head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos() * attention_factor, angles.sin() * attention_factor), dim=1).to(device)


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * plain / rope.factor + blend * plain
    return torch.where(wavelengths > longest, plain / rope.factor, torch.where(wavelengths < shortest, plain, between))


def _yarn(periods: Tensor, rope: RopeSpec, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): a linear ramp over the dimensions from extrapolation to interpolation."""

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - extrapolated) + 1.0 / periods * extrapolated


def _yarn_attention_factor(rope: RopeSpec) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)

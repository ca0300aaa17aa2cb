"""The fused steps, Triton kernels and torch twins, against float64 and against Hugging Face's order of rounding."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import fused, reference_fused
from kernels.dispatch import interpreter_on

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
GUARD = 7.0
DRAWN = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["kernel", "twin"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return fused if request.param == "kernel" else reference_fused


def roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one rounding; Triton's interpreter truncates to bf16, which costs a whole unit."""
    truncates = dtype == BF16 and device.type == "cpu" and interpreter_on()
    return torch.finfo(dtype).eps * (1.0 if truncates else 0.5)


def assert_within(got: Tensor, exact: Tensor, magnitude: Tensor, roundings: int, in_fp32: int = 8) -> None:
    """|got - exact| within so many roundings to got's dtype and to fp32, of ``magnitude``; float64 but for got."""
    limit = (roundings * roundoff(got.dtype, got.device) + in_fp32 * 2**-24) * magnitude
    # Results below the smallest normal number are rounded absolutely.
    excess = (got.double() - exact).abs() - limit - torch.finfo(got.dtype).smallest_normal
    assert excess.max().item() <= 0


def window_of(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(random (tokens, width) inside guard columns, the memory around it)."""
    memory = torch.full((tokens, width + 6), GUARD, dtype=dtype, device=device)
    view = memory[:, 3:-3]
    view.copy_(torch.randn(tokens, width))
    return view, memory


def assert_guarded(memory: Tensor) -> None:
    assert (memory[:, :3] == GUARD).all()
    assert (memory[:, -3:] == GUARD).all()


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [7, 128, 1000, 4096])
def test_residual_rms_norm(
    module: ModuleType, device: torch.device, hidden: int, dtype: torch.dtype, with_residual: bool
) -> None:
    x, _ = window_of(5, hidden, dtype, device)
    x[3] *= 1e-3  # so small that eps matters
    residual, residual_memory = window_of(5, hidden, dtype, device)
    residual[3] *= 1e-3
    out, out_memory = window_of(5, hidden, dtype, device)
    weight = torch.randn(hidden, device=device).to(dtype)
    before, total = x.double(), x.double() + residual.double()
    module.residual_rms_norm(x, residual if with_residual else None, weight, 1e-5, out)
    if with_residual:
        assert_within(residual, total, total.abs(), 1)
        before = residual.double()
    exact = before * torch.rsqrt(before.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_within(out, exact, exact.abs(), 2)
    assert_guarded(out_memory)
    assert_guarded(residual_memory)


def test_residual_rms_norm_in_place(module: ModuleType, device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 64, device=device)
    weight = torch.randn(64, device=device)
    expected, expected_residual = torch.empty_like(x), residual.clone()
    module.residual_rms_norm(x, expected_residual, weight, 1e-6, expected)
    module.residual_rms_norm(x, residual, weight, 1e-6, x)
    assert torch.equal(x, expected)
    assert torch.equal(residual, expected_residual)


def check_rope(
    module: ModuleType,
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    norm: bool,
) -> None:
    tokens, pages, half = 6, 5, head_dim // 2
    qkv, memory = window_of(tokens, (heads + 2 * kv_heads) * head_dim, dtype, device)
    angles = torch.randn(40, half, dtype=torch.float64) * 3
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device)
    positions = torch.randint(0, 40, (tokens,)).to(device)
    kv_slots = (torch.randperm(pages * page_size - 2)[:tokens] + 1).to(device)
    kv_slots[0], kv_slots[1], kv_slots[3] = pages * page_size - 1, 0, -1  # the ends, and a token to leave out
    caches = torch.full((pages, 2, page_size, kv_heads, head_dim), GUARD, dtype=dtype, device=device)
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(dtype) if norm else (None, None)
    before = qkv.double().unflatten(1, (-1, head_dim))
    module.rope_write_kv(qkv, cos_sin, positions, kv_slots, caches[:, 0], caches[:, 1], heads, q_weight, k_weight, 1e-6)

    def rotated(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        cos, sin = cos_sin[:, :half].double(), cos_sin[:, half:].double()
        turn = torch.complex(cos, sin)[positions][:, None]
        product = torch.complex(x[..., :half], x[..., half:]) * turn
        # Each component is a sum of two products; its rounding errors are relative to their absolute values.
        low, high = x[..., :half].abs(), x[..., half:].abs()
        cos, sin = turn.real.abs(), turn.imag.abs()
        sizes = torch.cat((low * cos + high * sin, low * sin + high * cos), -1)
        return torch.cat((product.real, product.imag), -1), sizes

    after = qkv.unflatten(1, (-1, head_dim))
    q, k, v = before.split((heads, kv_heads, kv_heads), dim=1)
    # cos or sin, the product and the sum are rounded once each; the norm rounds twice more.
    roundings = 5 if norm else 3
    assert_within(after[:, :heads], *rotated(q, q_weight), roundings)
    assert torch.equal(after[:, heads:].double(), before[:, heads:])
    assert_guarded(memory)
    written = kv_slots >= 0
    slots = kv_slots[written]
    page, offset = slots // page_size, slots % page_size
    exact, size = rotated(k, k_weight)
    assert_within(caches[page, 0, offset], exact[written], size[written], roundings)
    assert torch.equal(caches[page, 1, offset].double(), v[written])
    caches[page, :, offset] = GUARD
    assert (caches == GUARD).all()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(4, 4, 32, 16), (14, 2, 64, 16), (3, 1, 80, 32), (24, 8, 128, 16), (1, 1, 2, 16)],
)
def test_rope_write_kv(
    module: ModuleType,
    device: torch.device,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    norm: bool,
) -> None:
    check_rope(module, device, heads, kv_heads, head_dim, page_size, dtype, norm)


@DRAWN
@given(
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 70),
    page_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(),
)
def test_rope_write_kv_drawn(
    module: ModuleType,
    device: torch.device,
    group: int,
    kv_heads: int,
    half: int,
    page_size: int,
    dtype: torch.dtype,
    norm: bool,
) -> None:
    check_rope(module, device, group * kv_heads, kv_heads, 2 * half, page_size, dtype, norm)


def interpreted_bf16(dtype: torch.dtype, device: torch.device, module: ModuleType) -> bool:
    return module is fused and dtype == BF16 and device.type == "cpu" and interpreter_on()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rope_rounds_as_hugging_face_does(module: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Every bit of ``x * cos + rotate_half(x) * sin`` computed step by step in 16 bits."""
    if interpreted_bf16(dtype, device, module):
        pytest.skip("Triton's interpreter truncates to bf16 instead of rounding")
    heads, kv_heads, head_dim = 3, 1, 64
    qkv = torch.randn(9, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    cos_sin = torch.randn(9, head_dim, device=device)
    positions = torch.arange(9, device=device)
    cache = torch.zeros(1, 16, kv_heads, head_dim, dtype=dtype, device=device)
    x = qkv.unflatten(1, (-1, head_dim))[:, : heads + kv_heads].clone()
    module.rope_write_kv(qkv, cos_sin, positions, positions, cache, cache.clone(), heads)
    cos = cos_sin[:, : head_dim // 2].repeat(1, 2).to(dtype)[:, None]
    sin = cos_sin[:, head_dim // 2 :].repeat(1, 2).to(dtype)[:, None]
    turned = torch.cat((-x[..., head_dim // 2 :], x[..., : head_dim // 2]), dim=-1)
    expected = x * cos + turned * sin
    assert torch.equal(qkv.unflatten(1, (-1, head_dim))[:, :heads], expected[:, :heads])
    assert torch.equal(cache[0, :9], expected[:, heads:])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_norm_and_silu_round_as_hugging_face_does(module: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Both round in the middle: all but a few results (rsqrt and exp differ by a bit) are equal to the last bit."""
    if interpreted_bf16(dtype, device, module):
        pytest.skip("Triton's interpreter truncates to bf16 instead of rounding")
    x, residual = torch.randn(2, 32, 512, device=device).to(dtype)
    weight = torch.randn(512, device=device).to(dtype)
    added = x + residual
    wide = added.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    out = torch.empty_like(x)
    module.residual_rms_norm(x, residual, weight, 1e-5, out)
    assert torch.equal(residual, added)
    assert (out == expected).double().mean() > 0.995
    gate_up = torch.randn(32, 1024, device=device).to(dtype)
    module.silu_mul(gate_up, out)
    expected = torch.nn.functional.silu(gate_up[:, :512]) * gate_up[:, 512:]
    assert (out == expected).double().mean() > 0.995


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inter", [1, 33, 1000, 1024, 2500])
def test_silu_mul(module: ModuleType, device: torch.device, inter: int, dtype: torch.dtype) -> None:
    gate_up, _ = window_of(4, 2 * inter, dtype, device)
    gate_up[0, 0], gate_up[1, 0] = -200.0, 200.0  # exp overflows fp32 on one side
    out, memory = window_of(4, inter, dtype, device)
    gate, up = gate_up.double().chunk(2, dim=-1)
    module.silu_mul(gate_up, out)
    exact = gate * torch.sigmoid(gate) * up
    # A GPU's exp and division are approximate: some units of fp32 each, for the gates drawn here.
    assert_within(out, exact, exact.abs(), 2, in_fp32=16)
    assert_guarded(memory)


def test_no_tokens(module: ModuleType, device: torch.device) -> None:
    empty = torch.empty(0, 64, device=device)
    weight = torch.ones(64, device=device)
    module.residual_rms_norm(empty, empty, weight, 1e-5, empty)
    module.silu_mul(empty, torch.empty(0, 32, device=device))
    indices = torch.empty(0, dtype=torch.int64, device=device)
    cache = torch.full((1, 16, 1, 16), GUARD, device=device)
    module.rope_write_kv(empty, torch.ones(4, 16, device=device), indices, indices, cache, cache, 2)
    assert (cache == GUARD).all()


def test_rows_do_not_depend_on_the_batch(module: ModuleType, device: torch.device) -> None:
    """Bit for bit, for widths that fill no vector register."""
    if module is reference_fused and device.type == "cuda":
        pytest.skip("the twin serves CPU tensors; torch's CUDA reductions depend on the number of rows")
    x, residual = torch.randn(2, 37, 301, device=device)
    weight = torch.randn(301, device=device)
    gate_up = torch.randn(37, 602, device=device) * 4
    qkv = torch.randn(37, 5 * 14, device=device)
    cos_sin = torch.randn(50, 14, device=device)

    def run(rows: slice) -> tuple[Tensor, ...]:
        out, total, gated, turned = (t[rows].clone() for t in (x, residual, gate_up[:, :301], qkv))
        tokens = out.shape[0]
        cache = torch.zeros(3, 16, 1, 14, device=device)
        places = torch.arange(tokens, device=device)
        module.residual_rms_norm(out, total, weight, 1e-5, out)
        module.silu_mul(gate_up[rows], gated)
        module.rope_write_kv(
            turned,
            cos_sin,
            places + (rows.start or 0),
            places,
            cache,
            torch.zeros_like(cache),
            3,
            cos_sin[0],
            cos_sin[1],
        )
        return out, total, gated, turned, cache.flatten(0, 1)[:tokens]

    whole = run(slice(0, 37))
    for rows in (slice(0, 1), slice(5, 6), slice(11, 30), slice(36, 37)):
        for part, full in zip(run(rows), whole, strict=True):
            assert torch.equal(part, full[rows])


def test_refusals(device: torch.device) -> None:
    x, weight = torch.zeros(2, 64, device=device), torch.zeros(64, device=device)
    with pytest.raises(ValueError, match=r"residual is \(2, 32\)"):
        fused.residual_rms_norm(x, x[:, :32], weight, 1e-5, x)
    with pytest.raises(ValueError, match=r"weight is \(32,\)"):
        fused.residual_rms_norm(x, None, weight[:32], 1e-5, x)
    with pytest.raises(ValueError, match=r"out is \(2, 64\)"):
        fused.silu_mul(x, x)
    with pytest.raises(ValueError, match="last dim must be contiguous"):
        fused.silu_mul(x, torch.zeros(32, 2, device=device).t())
    cache = torch.zeros(1, 16, 1, 16, device=device)
    index = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"3 \+ 2 \* 1 heads of 16 need 80"):
        fused.rope_write_kv(x, x[:, :16], index, index, cache, cache, 3)
    with pytest.raises(ValueError, match="cos_sin has 8 columns"):
        fused.rope_write_kv(x, x[:, :8], index, index, cache, cache, 2)
    with pytest.raises(ValueError, match="each must be 2"):
        fused.rope_write_kv(x, x[:, :16], index, index[:1], cache, cache, 2)
    with pytest.raises(ValueError, match="equal in shape"):
        fused.rope_write_kv(x, x[:, :16], index, index, cache, cache[:, :8], 2)
    with pytest.raises(ValueError, match="together, or neither"):
        fused.rope_write_kv(x, x[:, :16], index, index, cache, cache, 2, q_weight=weight[:16])

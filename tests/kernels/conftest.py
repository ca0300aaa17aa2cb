"""Shared by the kernel tests: the device, seeds, float64 comparison and a builder of packed adapters.

The same files run three ways: Triton's interpreter on a CPU (``TRITON_INTERPRET=1``), compiled on a GPU, and the
torch twins alone on a CPU without either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreter_on
from kernels.lora_group import LoraGroup, packed_rank


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same ones in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one rounding to ``dtype``.

    Half a unit in the last place, except that Triton's interpreter truncates where it converts fp32 to bf16: there
    it is a whole one.
    """
    truncates = dtype == torch.bfloat16 and device.type == "cpu" and interpreter_on()
    return torch.finfo(dtype).eps * (1.0 if truncates else 0.5)


@pytest.fixture
def assert_rounded_once() -> Callable[[Tensor, Tensor, Tensor, int], None]:
    """Checks a sum of products that was accumulated in fp32 and rounded once to its dtype.

    Elementwise ``|got - exact| <= u(dtype) |exact| + (terms + 4) u(fp32) magnitude``, plus the smallest subnormal,
    where ``exact`` is the float64 result, ``magnitude`` the sum of the absolute values of what was added, and the
    second part the usual bound of an fp32 sum in any order.
    """

    def check(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
        info = torch.finfo(got.dtype)
        bound = unit_roundoff(got.dtype, got.device) * (1 + 2**-9) * exact.abs()
        bound += (terms + 4) * 2**-24 * magnitude + info.smallest_normal * info.eps
        excess = (got.double() - exact).abs() - bound
        worst = excess.argmax() if excess.numel() else None
        assert worst is None or excess.max() <= 0, (
            f"{got.dtype}: got {got.flatten()[worst].item()}, exact {exact.flatten()[worst].item()}, "
            f"bound {bound.flatten()[worst].item()}"
        )
        assert not got.isnan().any()

    return check


@dataclass
class PackedAdapters:
    """Adapters of mixed ranks in one arena that is NaN wherever no adapter lies."""

    group: LoraGroup
    arena: Tensor
    slot_table: Tensor
    ranks: tuple[int, ...]
    a: list[Tensor] = field(default_factory=list)  # per slot (slices, rank, in_features) float64
    b: list[list[Tensor]] = field(default_factory=list)  # per slot and slice (out_features, rank) float64


@pytest.fixture
def pack_adapters(device: torch.device) -> Callable[..., PackedAdapters]:
    def pack(
        group: LoraGroup, ranks: Sequence[int], dtype: torch.dtype, offsets: Sequence[int] | None = None
    ) -> PackedAdapters:
        """Slot i holds an adapter of ``ranks[i]``, one more slot has the least rank over NaN weights.

        By default no adapter is aligned to more than the vector that every offset is a multiple of.
        """
        span, padded = group.unit + group.size, [packed_rank(rank) for rank in ranks]
        if offsets is None:
            offsets = [8 * (2 * i + 1) + sum(padded[:i]) * span for i in range(len(ranks))]
        last = max(offset + rank * span for offset, rank in zip(offsets, padded, strict=True))
        length = last + packed_rank(1) * span + 64
        packed = PackedAdapters(group, torch.full((length,), torch.nan, dtype=dtype), torch.empty(0), tuple(ranks))
        for offset, rank in zip(offsets, ranks, strict=True):
            a = torch.randn(group.slices, rank, group.in_features).to(dtype)
            b = [torch.randn(width, rank).to(dtype) for width in group.out_features]
            beyond = packed_rank(rank) - rank
            padded_a = torch.nn.functional.pad(a, (0, 0, 0, beyond))
            padded_b = [torch.nn.functional.pad(matrix, (0, beyond)) for matrix in b]
            flat = torch.cat([padded_a.flatten(), *(matrix.flatten() for matrix in padded_b)])
            start = offset + packed_rank(rank) * group.unit
            packed.arena[start : start + flat.numel()] = flat
            packed.a.append(a.double().to(device))
            packed.b.append([matrix.double().to(device) for matrix in b])
        entries = [*zip(offsets, padded, strict=True), (last, packed_rank(1))]
        packed.slot_table = torch.tensor(entries, dtype=torch.int64, device=device)
        packed.arena = packed.arena.to(device)
        return packed

    return pack

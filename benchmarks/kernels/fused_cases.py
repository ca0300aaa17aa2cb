"""Cases of the fused elementwise kernels, beside the same in torch's own operations."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.common.report import Row
from benchmarks.kernels.case import OURS, Contest, KernelCase
from benchmarks.kernels.setting import KernelSetting
from engine.spec import ModelSpec
from kernels.fused import residual_rms_norm, rope_write_kv, silu_mul

KINDS = ("residual_rms_norm", "rope_write_kv", "rope_write_kv+norm", "silu_mul")
_PAGE = 16
_DECODE = 128  # up to so many tokens a step's activations stay in the L2, as they do in a decode step
_ROTATED_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class FusedCase(KernelCase):
    """One of ``KINDS`` over ``tokens`` rows of a model's activations."""

    kind: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int

    @classmethod
    def of(cls, spec: ModelSpec, kind: str, tokens: int) -> FusedCase:
        sizes = (spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        return cls(kind, *sizes, tokens)

    @property
    def compiled_as(self) -> Hashable:
        return self.kind, self.hidden, self.inner

    def names(self) -> Row:
        width = self.inner if self.kind == "silu_mul" else self.hidden
        return {"kernel": self.kind, "hidden": width, "batch": self.tokens}

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float | None:
        if self.tokens <= _DECODE:
            return 2.5
        return floor_us / 0.8 if self.tokens >= 4096 else None

    def contest(self, setting: KernelSetting) -> Contest:
        match self.kind:
            case "residual_rms_norm":
                return self._norm(setting)
            case "silu_mul":
                return self._silu(setting)
            case _:
                return self._rope(setting)

    def _copies(self, setting: KernelSetting, moved: int) -> int:
        rotate = setting.bandwidth and setting.device.type == "cuda" and self.tokens > _DECODE
        return max(2, min(16, _ROTATED_BYTES // moved)) if rotate else 1

    def _norm(self, setting: KernelSetting) -> Contest:
        moved = 4 * self.tokens * self.hidden * setting.dtype.itemsize
        copies, shape = self._copies(setting, moved), (self.tokens, self.hidden)
        x = [setting.normal(*shape) for _ in range(copies)]
        residual, out = [setting.zeros(*shape) for _ in x], [setting.zeros(*shape) for _ in x]
        weight = setting.normal(self.hidden)

        def ours(step: int) -> None:
            copy = step % copies
            residual_rms_norm(x[copy], residual[copy], weight, 1e-5, out[copy], operands_ready=True)

        def in_torch(step: int) -> None:
            copy = step % copies
            residual[copy] += x[copy]
            out[copy].copy_(functional.rms_norm(residual[copy], (self.hidden,), weight, 1e-5))

        return Contest({OURS: ours}, moved, {"torch": in_torch}, resident=(*x, *residual) if copies == 1 else ())

    def _silu(self, setting: KernelSetting) -> Contest:
        moved = 3 * self.tokens * self.inner * setting.dtype.itemsize
        copies = self._copies(setting, moved)
        gate_up = [setting.normal(self.tokens, 2 * self.inner) for _ in range(copies)]
        out = [setting.zeros(self.tokens, self.inner) for _ in gate_up]

        def ours(step: int) -> None:
            silu_mul(gate_up[step % copies], out[step % copies])

        def in_torch(step: int) -> None:
            gate, up = gate_up[step % copies].chunk(2, -1)
            torch.mul(functional.silu(gate), up, out=out[step % copies])

        return Contest({OURS: ours}, moved, {"torch": in_torch}, resident=tuple(gate_up) if copies == 1 else ())

    def _rope(self, setting: KernelSetting) -> Contest:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        # q is read and written in place; k and v are read, and written to the cache.
        moved = 2 * self.tokens * width * setting.dtype.itemsize + self.tokens * self.head_dim * 4
        copies = self._copies(setting, moved)
        qkv = [setting.normal(self.tokens, width) for _ in range(copies)]
        pages = -(-self.tokens // _PAGE)
        caches = [setting.zeros(2, pages, _PAGE, self.kv_heads, self.head_dim) for _ in qkv]
        angles = setting.normal(self.tokens, self.head_dim // 2, dtype=torch.float32)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        positions = torch.arange(self.tokens, device=setting.device)
        page = torch.randperm(pages, device=setting.device)
        slots = page[positions // _PAGE] * _PAGE + positions % _PAGE
        norms = [setting.normal(self.head_dim) for _ in range(2)] if self.kind.endswith("+norm") else [None, None]

        def ours(step: int) -> None:
            keys, values = caches[step % copies].unbind(0)
            rope_write_kv(
                qkv[step % copies], cos_sin, positions, slots, keys, values, self.heads, norms[0], norms[1], 1e-6
            )

        resident = (*qkv, cos_sin, positions, slots) if copies == 1 else ()
        return Contest({OURS: ours}, moved, resident=resident)

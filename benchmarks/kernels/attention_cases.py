"""Cases of paged attention, beside torch's own kernels on keys and values without pages."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.report import Row
from benchmarks.common.timing import Step
from benchmarks.kernels.case import OURS, Contest, KernelCase
from benchmarks.kernels.setting import KernelSetting
from engine.spec import ModelSpec
from kernels.attention import paged_decode, paged_prefill

PAGE = 16  # tokens, the engine's default
_ROTATED_BYTES = 512 << 20  # keys and values that a run steps through, ten times an H100's L2


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of one layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Heads:
        return cls(spec.num_heads, spec.num_kv_heads, spec.head_dim)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class _Cache:
    """Keys and values of ``copies`` equal batches in permuted pages; step i of a run belongs to copy i % copies."""

    def __init__(self, setting: KernelSetting, heads: Heads, rows: int, context: int) -> None:
        pages = -(-context // PAGE)
        one = 2 * rows * pages * PAGE * heads.kv_heads * heads.head_dim * setting.dtype.itemsize
        self.copies = max(1, -(-_ROTATED_BYTES // one)) if setting.device.type == "cuda" and setting.bandwidth else 1
        self.copies = min(self.copies, 64)
        shape = (self.copies * rows * pages, PAGE, heads.kv_heads, heads.head_dim)
        self.keys, self.values = setting.normal(*shape), setting.normal(*shape)
        order = torch.randperm(self.copies * rows * pages, device=setting.device, dtype=torch.int32)
        self.tables = list(order.view(self.copies, rows, pages).unbind(0))
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device=setting.device)
        dense = (self.copies, rows, pages * PAGE, heads.kv_heads, heads.head_dim)
        self.dense_keys = self.keys.view(dense)[:, :, :context]
        self.dense_values = self.values.view(dense)[:, :, :context]


@dataclass(frozen=True, slots=True)
class DecodeAttentionCase(KernelCase):
    """``paged_decode`` of one layer, every row at the same context length."""

    heads: Heads
    batch: int
    context: int

    @property
    def compiled_as(self) -> Hashable:
        return "decode", self.heads, self.batch, self.context

    def names(self) -> Row:
        return {"kernel": f"paged_decode {self.context}", "hidden": self.heads.width, "batch": self.batch}

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float | None:
        limits = {(64, 4096): floor_us / 0.85, (1, 32768): floor_us * 1.2}
        return limits.get((self.batch, self.context))

    def contest(self, setting: KernelSetting) -> Contest:
        cache, shape = _Cache(setting, self.heads, self.batch, self.context), self.heads
        q = setting.normal(self.batch, shape.heads, shape.head_dim)
        out, scale = torch.empty_like(q), shape.head_dim**-0.5

        def ours(step: int) -> None:
            table = cache.tables[step % cache.copies]
            paged_decode(q, cache.keys, cache.values, table, cache.lengths, out, scale)

        def sdpa(step: int) -> Tensor:
            copy = step % cache.copies
            keys, values = cache.dense_keys[copy].transpose(1, 2), cache.dense_values[copy].transpose(1, 2)
            return functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

        positions = self.batch * self.context
        moved = 2 * positions * shape.kv_heads * shape.head_dim * setting.dtype.itemsize + q.nbytes + out.nbytes
        return Contest({OURS: ours}, moved, {"sdpa": sdpa}, flops=4 * positions * shape.width, resident=(q,))


@dataclass(frozen=True, slots=True)
class PrefillAttentionCase(KernelCase):
    """``paged_prefill`` of one layer without a cached prefix, beside torch's FlashAttention-2 on the same lengths."""

    heads: Heads
    prompts: int
    length: int

    @property
    def compiled_as(self) -> Hashable:
        return "prefill", self.heads

    def names(self) -> Row:
        named = {"hidden": self.heads.width, "batch": self.prompts * self.length}
        return {"kernel": f"paged_prefill {self.prompts}x{self.length}"} | named

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float | None:
        fastest = min((us for name, us in rivals.items() if name in {"fa2", "sdpa"}), default=None)
        return None if fastest is None else fastest / 0.6

    def contest(self, setting: KernelSetting) -> Contest:
        cache, shape = _Cache(setting, self.heads, self.prompts, self.length), self.heads
        tokens = self.prompts * self.length
        starts = torch.arange(self.prompts + 1, dtype=torch.int32, device=setting.device) * self.length
        q = setting.normal(tokens, shape.heads, shape.head_dim)
        out, scale = torch.empty_like(q), shape.head_dim**-0.5

        def ours(step: int) -> None:
            table = cache.tables[step % cache.copies]
            paged_prefill(q, cache.keys, cache.values, table, starts, cache.lengths, out, scale, self.length)

        def dense(step: int) -> tuple[Tensor, Tensor]:
            copy = step % cache.copies
            return cache.dense_keys[copy], cache.dense_values[copy]

        def sdpa(step: int) -> Tensor:
            queries = q.view(self.prompts, self.length, shape.heads, shape.head_dim).transpose(1, 2)
            keys, values = (tensor.transpose(1, 2) for tensor in dense(step))
            return functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

        in_torch: dict[str, Step] = {"sdpa": sdpa}
        if setting.device.type == "cuda":

            def fa2(step: int) -> object:
                keys, values = (tensor.reshape(tokens, *tensor.shape[2:]) for tensor in dense(step))
                return _varlen(q, keys, values, starts, self.length)

            in_torch["fa2"] = fa2
        pairs = self.prompts * self.length * (self.length + 1) // 2
        cached = 2 * tokens * shape.kv_heads * shape.head_dim * setting.dtype.itemsize
        return Contest({OURS: ours}, cached + q.nbytes + out.nbytes, in_torch, flops=4 * pairs * shape.width)


def _varlen(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int) -> object:
    """torch's varlen attention, causal; from torch 2.12 on it asks to be told that heads share keys."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - absent before torch 2.10

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, keys, values, starts, starts, longest, longest, window_size=(-1, 0), **grouped)

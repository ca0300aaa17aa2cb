"""Cases of choosing the next token, beside the usual torch code that sorts the vocabulary."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.report import Row
from benchmarks.kernels.case import OURS, Contest, KernelCase
from benchmarks.kernels.setting import KernelSetting
from kernels.sampling import sample

_COPIES = 4  # of the logits, together larger than an H100's L2


@dataclass(frozen=True, slots=True)
class SamplingCase(KernelCase):
    """``sample`` with every row greedy, or with top-k, top-p and min-p all on (``filters``)."""

    batch: int
    vocab: int
    filters: bool

    @property
    def compiled_as(self) -> Hashable:
        return "sample", self.vocab, self.filters

    def names(self) -> Row:
        return {
            "kernel": f"sample {'filters' if self.filters else 'greedy'}",
            "hidden": self.vocab,
            "batch": self.batch,
        }

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float | None:
        if (self.batch, self.vocab) != (64, 128256):
            return None
        return 400.0 if self.filters else 100.0

    def contest(self, setting: KernelSetting) -> Contest:
        logits = [4 * setting.normal(self.batch, self.vocab, dtype=torch.float32) for _ in range(_COPIES)]

        def every(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((self.batch,), value, dtype=dtype, device=setting.device)

        temperature = every(0.8 if self.filters else 0.0, torch.float32)
        top_k = every(50 if self.filters else 0, torch.int64)
        top_p = every(0.9 if self.filters else 1.0, torch.float32)
        min_p = every(0.01 if self.filters else 0.0, torch.float32)
        seed = torch.arange(self.batch, device=setting.device)
        position = every(17, torch.int64)
        rows = torch.arange(self.vocab, device=setting.device)

        def ours(step: int) -> Tensor:
            return sample(logits[step % _COPIES], temperature, top_k, top_p, min_p, seed, position)

        def in_torch(step: int) -> Tensor:
            values = logits[step % _COPIES]
            if not self.filters:
                return values.argmax(-1)
            ordered, ids = (values / temperature[:, None]).sort(-1, descending=True)
            ordered = ordered.masked_fill(rows >= top_k[:, None], float("-inf"))
            mass = ordered.softmax(-1)
            mass = mass.masked_fill(mass.cumsum(-1) - mass > top_p[:, None], 0.0)
            mass = mass.masked_fill(mass < min_p[:, None] * mass[:, :1], 0.0)
            drawn = (mass / torch.empty_like(mass).exponential_()).argmax(-1, keepdim=True)
            return ids.gather(1, drawn)[:, 0]

        # Each logit once; a filter needs more, and how little it gets by with is its art.
        return Contest({OURS: ours}, logits[0].nbytes + 8 * self.batch, {"torch": in_torch}, resident=(temperature,))

"""The LoRA kernels' cases: stacked adapters with rivals, packed groups, and prefill segments."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.report import Row
from benchmarks.common.timing import Step
from benchmarks.kernels.case import OURS, Contest, KernelCase
from benchmarks.kernels.lora_work import AdapterRows, LoraWork, group_work, segment_work, stacked_tensors
from benchmarks.kernels.rivals import Rival
from benchmarks.kernels.setting import KernelSetting
from kernels.lora_group import LoraGroup


def bgmv_limit_us(floor_us: float) -> float:
    """What the decode kernels may take: an empty kernel, some latency, and the bytes at 95 % of the copy's speed."""
    return 1.9 + 1.05 * floor_us


def _contest(work: LoraWork) -> Contest:
    return Contest({OURS: work.step}, work.moved, flops=work.flops, resident=work.resident, check=work.check)


@dataclass(frozen=True, slots=True)
class StackedCase(KernelCase):
    """``bgmv_expand`` or ``bgmv_shrink`` (``op``) beside gather + bmm, a loop over the adapters, and given rivals."""

    op: str
    hidden: int
    rank: int
    batch: int
    dist: str
    rivals: tuple[Rival, ...] = ()

    @property
    def compiled_as(self) -> Hashable:
        return self.op, self.hidden, self.rank

    def names(self) -> Row:
        named = {"hidden": self.hidden, "rank": self.rank, "batch": self.batch, "dist": self.dist}
        return {"kernel": f"bgmv_{self.op}"} | named

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float:
        return bgmv_limit_us(floor_us)

    def contest(self, setting: KernelSetting) -> Contest:
        work, inputs, weights, rows = stacked_tensors(setting, self.op, self.hidden, self.rank, self.batch, self.dist)
        output, expand = work.output, self.op == "expand"
        x = inputs.to(setting.dtype)

        def gather(step: int) -> None:
            product = torch.bmm(weights[rows.indices[step].long()], x[:, :, None])[:, :, 0]
            _put(output, product, expand)

        contest = _contest(work)
        contest.in_torch.update(gather=gather, loop=_loop(x, weights, output, rows, expand))
        contest.slower.update(loop=self.batch)
        for rival in self.rivals:
            if rival.op == self.op:
                contest.ways[rival.name] = _rival_step(rival, inputs, weights, output, rows)
        return contest


def _put(output: Tensor, value: Tensor, add: bool) -> None:
    if add:
        output += value
    else:
        output.copy_(value)


def _loop(x: Tensor, weights: Tensor, output: Tensor, rows: AdapterRows, add: bool) -> Step:
    """One product an adapter, for the rows that use it; which those are, the host knows, as an engine would."""
    batch = x.shape[0]
    steps: list[list[tuple[int, Tensor]]] = []
    for indices in rows.storage[: max(2, len(rows.indices) // batch), :batch].tolist():
        users: dict[int, list[int]] = {}
        for row, adapter in enumerate(indices):
            users.setdefault(adapter, []).append(row)
        steps.append([(adapter, torch.tensor(mine, device=x.device)) for adapter, mine in users.items()])

    def step(index: int) -> None:
        for adapter, mine in steps[index]:
            product = x.index_select(0, mine) @ weights[adapter].T
            if add:
                output.index_add_(0, mine, product)
            else:
                output.index_copy_(0, mine, product.float())

    return step


def _rival_step(rival: Rival, inputs: Tensor, weights: Tensor, output: Tensor, rows: AdapterRows) -> Step:
    last = True if rival.op == "expand" else 1.0  # add_inputs, or scaling
    return lambda step: rival.load()(inputs, weights, output, rows.indices[step], last)


@dataclass(frozen=True, slots=True)
class GroupCase(KernelCase):
    """The packed shrink or expand (``op``) of one projection group. max_rank: the rank class of the slots."""

    op: str
    name: str
    group: LoraGroup
    rank: int
    max_rank: int
    batch: int
    dist: str

    @property
    def compiled_as(self) -> Hashable:
        return self.op, self.group, self.max_rank

    def names(self) -> Row:
        width = self.group.out_total if self.op == "expand_slices" else self.group.in_features
        named = {"hidden": width, "rank": self.rank, "batch": self.batch, "dist": self.dist}
        wider = f" in class {self.max_rank}" if self.max_rank > self.rank else ""
        return {"kernel": f"bgmv_{self.op} {self.name}{wider}"} | named

    def limit_us(self, floor_us: float, rivals: dict[str, float]) -> float:
        return bgmv_limit_us(floor_us)

    def contest(self, setting: KernelSetting) -> Contest:
        return _contest(group_work(setting, self.op, self.group, self.rank, self.max_rank, self.batch, self.dist))


@dataclass(frozen=True, slots=True)
class SegmentCase(KernelCase):
    """``sgmv_shrink`` or ``sgmv_expand`` (``op``) of one group over equal segments of tokens, an adapter each."""

    op: str
    name: str
    group: LoraGroup
    rank: int
    segments: int
    length: int

    @property
    def compiled_as(self) -> Hashable:
        return self.op, self.group, self.rank

    def names(self) -> Row:
        width = self.group.out_total if self.op == "sgmv_expand" else self.group.in_features
        named = {"hidden": width, "rank": self.rank, "batch": self.segments * self.length, "dist": "distinct"}
        return {"kernel": f"{self.op} {self.name} {self.segments}x{self.length}"} | named

    def contest(self, setting: KernelSetting) -> Contest:
        return _contest(segment_work(setting, self.op, self.group, self.rank, self.segments, self.length))

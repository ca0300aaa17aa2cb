"""Calls of the LoRA kernels on made tensors: what the kernel benchmark times and the tuner searches over."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.distributions import choose_adapters
from benchmarks.common.timing import Step
from benchmarks.kernels.setting import KernelSetting
from kernels import reference
from kernels.bgmv_expand import bgmv_expand, bgmv_expand_slices
from kernels.bgmv_shrink import bgmv_shrink, bgmv_shrink_slices
from kernels.lora_group import LoraGroup
from kernels.sgmv import sgmv_expand, sgmv_shrink

ADAPTERS = 64  # most adapters in one batch, as in a replica's slots


@dataclass(frozen=True, slots=True)
class LoraWork:
    """One kernel on one shape. Step i of a run reads adapters that the steps before it did not, while there are any.

    twin: the torch twin of step 0. output: what both write. moved: bytes that a step cannot but read and write, each
    distinct adapter counted once. resident: what a decode step would find in the L2.
    """

    step: Step
    twin: Callable[[], object]
    output: Tensor
    moved: int
    flops: int
    resident: tuple[Tensor, ...]

    def result(self, call: Callable[[], object]) -> Tensor:
        """The output of ``call`` on zeros."""
        self.output.zero_()
        call()
        return self.output.clone()

    def check(self, call: Callable[[], object], strict: bool = True) -> None:
        """Raises ValueError when ``call`` does not give the twin's result.

        strict: but for the order of fp32 sums and one rounding. Otherwise within what working in 16 bits may cost.
        """
        expected = self.result(self.twin).float()
        error = (self.result(call).float() - expected).abs().max().item()
        largest = expected.abs().max().item()
        allowed = (2**-13 if self.output.dtype == torch.float32 else 2**-7) if strict else 2**-5
        if not error <= largest * allowed:  # NaN too
            raise ValueError(f"wrong by {error:.3g} where values reach {largest:.3g}")


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which adapter of a pool each row uses, for each step: ``(steps, batch)`` int32, -1 for base rows.

    Rows of one step share what the distribution makes them share, those of one adapter side by side; each step moves
    on by ``distinct`` adapters.
    """

    indices: list[Tensor]
    storage: Tensor
    distinct: int

    @classmethod
    def make(cls, setting: KernelSetting, dist: str, batch: int, available: int, steps: int) -> AdapterRows:
        chosen = sorted(choose_adapters(dist, batch, min(ADAPTERS, available), random.Random(0)))
        number = {adapter: count for count, adapter in enumerate(dict.fromkeys(chosen))}
        first = torch.tensor([-1 if adapter < 0 else number[adapter] for adapter in chosen], dtype=torch.int32)
        distinct = len(number) - (-1 in number)
        # Each step's indices begin at a multiple of 64 bytes, as an allocation of its own would.
        storage = torch.full((steps, -(-batch // 16) * 16), -1, dtype=torch.int32)
        for step in range(steps):
            storage[step, :batch] = torch.where(first < 0, first, (first + step * distinct) % available)
        storage = storage.to(setting.device)
        return cls([row[:batch] for row in storage.unbind(0)], storage, distinct)


def stacked_work(setting: KernelSetting, op: str, hidden: int, rank: int, batch: int, dist: str) -> LoraWork:
    """``bgmv_expand`` or ``bgmv_shrink`` (``op``) on stacked adapters: the calls that LoRAX exposes.

    As ``shared`` where ``op`` says so (``expand_shared``), and where adapters have two rows each on the average.
    """
    work, *_ = stacked_tensors(setting, op, hidden, rank, batch, dist)
    return work


def stacked_tensors(
    setting: KernelSetting, op: str, hidden: int, rank: int, batch: int, dist: str
) -> tuple[LoraWork, Tensor, Tensor, AdapterRows]:
    """The same with its inputs, weights and indices, for those who compute it another way."""
    element, size = setting.dtype.itemsize, hidden * rank
    available = setting.pool.numel() // size
    expand = op.startswith("expand")
    shape = (hidden, rank) if expand else (rank, hidden)
    weights = setting.pool[: available * size].view(available, *shape)
    if expand:
        inputs, output = setting.normal(batch, rank, dtype=torch.float32), setting.zeros(batch, hidden)
        activations = inputs.nbytes + 2 * output.nbytes
    else:
        inputs, output = setting.normal(batch, hidden), setting.zeros(batch, rank, dtype=torch.float32)
        activations = inputs.nbytes + output.nbytes
    distinct = AdapterRows.make(setting, dist, batch, available, 1).distinct
    shared = op.endswith("_shared") or batch >= 2 * distinct > 0
    moved = distinct * size * element + activations
    rows = AdapterRows.make(setting, dist, batch, available, setting.steps(moved))

    def call(step: int) -> None:
        function = bgmv_expand if expand else bgmv_shrink
        function(inputs, weights, output, rows.indices[step], operands_ready=True, shared=shared)

    def twin() -> None:
        function = reference.bgmv_expand if expand else reference.bgmv_shrink
        function(inputs, weights, output, rows.indices[0])

    flops = 2 * batch * size
    return LoraWork(call, twin, output, moved, flops, (inputs, rows.storage)), inputs, weights, rows


def _arena(setting: KernelSetting, group: LoraGroup, rank: int) -> tuple[Tensor, Tensor]:
    """The pool as an arena of adapters that hold this group alone, and its slot table."""
    size = rank * (group.unit + group.size)
    available = setting.pool.numel() // size
    table = torch.tensor([[slot * size, rank] for slot in range(available)], device=setting.device)
    return setting.pool[: available * size], table


def group_work(
    setting: KernelSetting, op: str, group: LoraGroup, rank: int, max_rank: int, batch: int, dist: str
) -> LoraWork:
    """``bgmv_expand_slices`` or ``bgmv_shrink_slices`` (``op``) of one packed group, adapters as in the slots.

    As in a decode step, weights and indices are ready when the kernel is launched, so it may begin to load them while
    the one before it ends.
    """
    arena, table = _arena(setting, group, rank)
    shrunk = setting.normal(group.splits, group.slices, batch, max_rank, dtype=torch.float32)
    own = shrunk[..., :rank].numel() * 4
    if op == "expand_slices":
        inputs, output = shrunk, setting.zeros(batch, group.out_total)
        width, activations = group.out_total, own + 2 * output.nbytes
    else:
        inputs, output = setting.normal(batch, group.in_features), torch.zeros_like(shrunk)
        width, activations = group.slices * group.in_features, own + inputs.nbytes
    distinct = AdapterRows.make(setting, dist, batch, len(table), 1).distinct
    moved = distinct * rank * width * setting.dtype.itemsize + (activations if distinct else 0)
    rows = AdapterRows.make(setting, dist, batch, len(table), setting.steps(moved))
    function = bgmv_expand_slices if op == "expand_slices" else bgmv_shrink_slices

    def call(step: int) -> None:
        function(inputs, arena, table, output, rows.indices[step], group, operands_ready=True)

    def twin() -> None:
        same = reference.bgmv_expand_slices if op == "expand_slices" else reference.bgmv_shrink_slices
        same(inputs, arena, table, output, rows.indices[0], group)

    flops = 2 * batch * rank * width if distinct else 0
    return LoraWork(call, twin, output, moved, flops, (inputs, rows.storage, table))


def segment_work(setting: KernelSetting, op: str, group: LoraGroup, rank: int, segments: int, length: int) -> LoraWork:
    """``sgmv_expand`` or ``sgmv_shrink`` (``op``) of one packed group over equal segments, each with its adapter."""
    arena, table = _arena(setting, group, rank)
    tokens = segments * length
    starts = torch.arange(segments + 1, dtype=torch.int32, device=setting.device) * length
    shrunk = setting.normal(group.slices, tokens, rank, dtype=torch.float32)
    if op == "sgmv_expand":
        inputs, output = shrunk, setting.zeros(tokens, group.out_total)
        width, activations = group.out_total, shrunk.nbytes + 2 * output.nbytes
    else:
        inputs, output = setting.normal(tokens, group.in_features), torch.zeros_like(shrunk)
        width, activations = group.slices * group.in_features, shrunk.nbytes + inputs.nbytes
    moved = segments * rank * width * setting.dtype.itemsize + activations
    flops = 2 * tokens * rank * width
    rows = AdapterRows.make(setting, "distinct", segments, len(table), setting.steps(moved, flops))
    function = sgmv_expand if op == "sgmv_expand" else sgmv_shrink

    def call(step: int) -> None:
        function(inputs, arena, table, output, starts, rows.indices[step], group, length, operands_ready=True)

    def twin() -> None:
        same = reference.sgmv_expand if op == "sgmv_expand" else reference.sgmv_shrink
        same(inputs, arena, table, output, starts, rows.indices[0], group, length)

    return LoraWork(call, twin, output, moved, flops, (rows.storage, table, starts))

"""Which shapes ``benchmarks.kernels`` measures by default, and the cases that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapter_store.layout import AdapterLayout
from benchmarks.kernels.attention_cases import DecodeAttentionCase, Heads, PrefillAttentionCase
from benchmarks.kernels.case import Case
from benchmarks.kernels.fused_cases import KINDS, FusedCase
from benchmarks.kernels.lora_cases import GroupCase, SegmentCase, StackedCase
from benchmarks.kernels.lora_step import LoraStepCase
from benchmarks.kernels.rivals import Rival
from benchmarks.kernels.sampling_cases import SamplingCase
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from kernels.lora_group import LoraGroup

OPS = ("expand", "shrink", "groups", "sgmv", "attention", "fused", "step", "prefill_step", "sample")
_GROUP_RANK = 16  # what packed groups, segments and steps are measured at


@dataclass(frozen=True, slots=True)
class Grid:
    """Shapes to measure. batch: rows of a decode step; the stacked kernels also take ``twice_batch``, where two rows
    share each adapter. segments: (how many, tokens of each). contexts: (rows, cached tokens)."""

    hidden: tuple[int, ...]
    rank: tuple[int, ...]
    batch: tuple[int, ...]
    twice_batch: int
    segments: tuple[tuple[int, int], ...]
    contexts: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    slots: int
    prefill: tuple[tuple[int, int], ...]
    sample_batch: int


FULL = Grid(
    hidden=(1024, 4096, 14336),
    rank=(8, 16, 32, 64),
    batch=(1, 8, 32, 64),
    twice_batch=128,
    segments=((64, 128), (1, 128), (1, 8192)),
    contexts=((64, 4096), (1, 32768), (64, 1024), (8, 1024), (1, 1024)),
    prompts=((1, 2048), (1, 8192), (16, 128)),
    tokens=(1, 8, 32, 64, 128, 4096, 8192),
    slots=64,
    prefill=((64, 128),),
    sample_batch=64,
)
TINY = Grid(
    hidden=(256, 512),
    rank=(8, 16),
    batch=(1, 4),
    twice_batch=8,
    segments=((2, 8), (1, 20)),
    contexts=((2, 40),),
    prompts=((2, 24),),
    tokens=(1, 16),
    slots=4,
    prefill=((2, 8),),
    sample_batch=2,
)


def groups_of(layout: AdapterLayout) -> dict[str, LoraGroup]:
    """Each projection group alone in an adapter: what a kernel reads lies in one piece whatever else the slab holds."""
    return {group.name: LoraGroup(0, group.in_features, group.out_features) for group in layout.groups}


def cases(grid: Grid, ops: tuple[str, ...], spec: ModelSpec, rivals: tuple[Rival, ...]) -> Iterator[Case]:
    """The cases of ``ops``, in the order of ``OPS``."""
    makers = {
        "expand": lambda: _stacked(grid, "expand", rivals),
        "shrink": lambda: _stacked(grid, "shrink", rivals),
        "groups": lambda: _groups(grid, spec),
        "sgmv": lambda: _segments(grid, spec),
        "attention": lambda: _attention(grid, spec),
        "fused": lambda: (FusedCase.of(spec, kind, tokens) for kind in KINDS for tokens in grid.tokens),
        "step": lambda: iter(
            [LoraStepCase(spec, _GROUP_RANK, grid.slots, grid.batch, ("distinct", "zipf", "identical", "base"))]
        ),
        "prefill_step": lambda: (
            LoraStepCase(spec, _GROUP_RANK, grid.slots, (rows,), ("distinct",), length) for rows, length in grid.prefill
        ),
        "sample": lambda: (SamplingCase(grid.sample_batch, spec.vocab_size, filters) for filters in (False, True)),
    }
    for op in OPS:
        if op in ops:
            yield from makers[op]()


def _stacked(grid: Grid, op: str, rivals: tuple[Rival, ...]) -> Iterator[Case]:
    for hidden in grid.hidden:
        for rank in grid.rank:
            for batch in (*grid.batch, grid.twice_batch):
                yield StackedCase(op, hidden, rank, batch, "distinct", rivals)
    for hidden in grid.hidden:
        for dist in ("zipf", "identical"):
            yield StackedCase(op, hidden, _GROUP_RANK, grid.batch[-1], dist, rivals)


def _groups(grid: Grid, spec: ModelSpec) -> Iterator[Case]:
    most = grid.batch[-1]
    for op in ("shrink_slices", "expand_slices"):
        for name, group in groups_of(adapter_layout(spec)).items():
            for batch in grid.batch:
                yield GroupCase(op, name, group, _GROUP_RANK, _GROUP_RANK, batch, "distinct")
            for dist in ("zipf", "identical", "base"):
                yield GroupCase(op, name, group, _GROUP_RANK, _GROUP_RANK, most, dist)
            # An adapter in a larger class than its own costs what its rank costs.
            yield GroupCase(op, name, group, 8, 64, most, "distinct")
            yield GroupCase(op, name, group, 8, 8, most, "distinct")


def _segments(grid: Grid, spec: ModelSpec) -> Iterator[Case]:
    for op in ("sgmv_shrink", "sgmv_expand"):
        for name, group in groups_of(adapter_layout(spec)).items():
            for segments, length in grid.segments:
                yield SegmentCase(op, name, group, _GROUP_RANK, segments, length)


def _attention(grid: Grid, spec: ModelSpec) -> Iterator[Case]:
    for batch, context in grid.contexts:
        yield DecodeAttentionCase(Heads.of(spec), batch, context)
    for prompts, length in grid.prompts:
        yield PrefillAttentionCase(Heads.of(spec), prompts, length)

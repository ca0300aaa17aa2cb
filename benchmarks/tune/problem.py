"""One key of a tuned table, and the work that is done under it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapter_store.layout import AdapterLayout
from benchmarks.kernels.grid import groups_of
from benchmarks.kernels.lora_work import LoraWork, group_work, segment_work, stacked_work
from benchmarks.kernels.setting import KernelSetting
from kernels.lora_group import LoraGroup

STACKED = ("expand", "shrink")
SLICES = ("expand_slices", "shrink_slices")
SEGMENTS = ("sgmv_expand", "sgmv_shrink")
SHARED = ("expand_shared", "shrink_shared")
OPS = (*STACKED, *SHARED, *SLICES, *SEGMENTS)
Segments = tuple[int, int]  # how many, tokens of each


def table_key(op: str, group: LoraGroup, rank: int) -> tuple[int, int]:
    """(hidden, rank) under which the kernel of a packed group looks its configuration up."""
    hidden = group.out_total if op in ("expand_slices", "sgmv_expand") else group.in_features
    return hidden, rank * group.slices if op == "sgmv_shrink" else rank


@dataclass(frozen=True, slots=True)
class Problem:
    """A table key and its points: batches, or for sgmv shapes, which one configuration (batch 1) must serve.

    users: what looks up this key, a packed group and its adapters' rank each; none for the stacked kernels.
    """

    op: str
    hidden: int
    rank: int
    points: tuple[int | Segments, ...]
    users: tuple[tuple[LoraGroup, int], ...] = ()

    @property
    def mixed(self) -> bool:
        """Whether points may have configurations of their own."""
        return self.op not in SEGMENTS

    def batch(self, point: int | Segments) -> int:
        """The batch that the table files a point under."""
        return point if isinstance(point, int) else 1

    def works(self, setting: KernelSetting, point: int | Segments) -> list[LoraWork]:
        """All that is launched under this key at one point."""
        if isinstance(point, tuple):
            return [segment_work(setting, self.op, group, rank, *point) for group, rank in self.users]
        if not self.users:
            return [stacked_work(setting, self.op, self.hidden, self.rank, point, "distinct")]
        return [group_work(setting, self.op, group, rank, rank, point, "distinct") for group, rank in self.users]


def problems(
    op: str,
    layout: AdapterLayout,
    hidden: tuple[int, ...],
    ranks: tuple[int, ...],
    batches: tuple[int, ...],
    segments: tuple[Segments, ...],
) -> Iterator[Problem]:
    """Every key of ``op``: of the given widths for the stacked kernels, else of the model's groups."""
    if op in (*STACKED, *SHARED):
        yield from (Problem(op, width, rank, batches) for rank in ranks for width in hidden)
        return
    keys: dict[tuple[int, int], list[tuple[LoraGroup, int]]] = {}
    for rank in ranks:
        for group in groups_of(layout).values():
            keys.setdefault(table_key(op, group, rank), []).append((group, rank))
    points = segments if op in SEGMENTS else batches
    for (width, table_rank), users in keys.items():
        yield Problem(op, width, table_rank, points, tuple(users))

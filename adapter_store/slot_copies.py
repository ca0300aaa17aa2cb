"""Copies from host memory into slots: on CUDA beside everything else, and how long each took."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from adapter_store.load_stats import LoadMeter, LoadTotals
from adapter_store.packed import PackedAdapter


class CopyUnderWay(NamedTuple):
    """It keeps its adapter's memory until it is through."""

    begun: torch.cuda.Event
    through: torch.cuda.Event
    packed: PackedAdapter
    done: Callable[[], None]


class SlotCopies:
    """The copies on one stream, or on the CPU where there is none. Used by one thread; any may read ``totals``."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._under_way: deque[CopyUnderWay] = deque()
        self._meter = LoadMeter()

    @property
    def totals(self) -> LoadTotals:
        """Copies that are through, in their own time: what they waited for beforehand is not counted."""
        return self._meter.totals

    def start(
        self,
        packed: PackedAdapter,
        writes: Iterable[tuple[Tensor, Tensor]],
        *,
        behind: torch.cuda.Event | None = None,
        done: Callable[[], None] | None = None,
    ) -> torch.cuda.Event | None:
        """Make the writes (target, source), in this order, once ``behind`` has happened. Does not block on CUDA.

        done: called when they have been read, by ``settle`` or, on the CPU, at once. Returns what tells that they are
        through, None on the CPU.
        """
        if self._stream is None:
            with self._meter.measure() as work:
                for target, source in writes:
                    target.copy_(source)
                work.bytes = packed.nbytes
            if done is not None:
                done()
            return None
        begun, through = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            if behind is not None:
                self._stream.wait_event(behind)
            begun.record(self._stream)
            for target, source in writes:
                target.copy_(source, non_blocking=True)
            through.record(self._stream)
        self._under_way.append(CopyUnderWay(begun, through, packed, done or _nothing))
        return through

    def settle(self) -> int:
        """Call ``done`` of those that are through; returns how many are still under way. Never blocks."""
        while self._under_way and self._under_way[0].through.query():
            copy = self._under_way.popleft()
            self._meter.count(copy.begun.elapsed_time(copy.through) / 1000, copy.packed.nbytes)
            copy.done()
        return len(self._under_way)


def _nothing() -> None:
    """What a copy does at its end when nobody waits for it."""

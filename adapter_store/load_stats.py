"""What loading adapters took so far: counters that only grow, and what is remembered now."""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from adapter_store.host_cache import HostCacheStats, HostMemoryFull

#: Upper bounds of ``LoadTotals.by_seconds``; its last count is of what took longer.
SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class LoadTotals:
    """One kind of work since the start.

    done: times that it succeeded. failed: times that it did not. bytes: of what was done.
    by_seconds: how often it took how long, done or failed, by ``SECONDS_BOUNDS``. spent: seconds of each of these.
    """

    done: int = 0
    failed: int = 0
    bytes: int = 0
    by_seconds: tuple[int, ...] = (0,) * (len(SECONDS_BOUNDS) + 1)
    spent: tuple[float, ...] = (0.0,) * (len(SECONDS_BOUNDS) + 1)

    def __add__(self, other: LoadTotals) -> LoadTotals:
        return LoadTotals(
            self.done + other.done,
            self.failed + other.failed,
            self.bytes + other.bytes,
            tuple(one + more for one, more in zip(self.by_seconds, other.by_seconds, strict=True)),
            tuple(one + more for one, more in zip(self.spent, other.spent, strict=True)),
        )

    @property
    def seconds(self) -> float:
        """Spent on all of it, done or failed."""
        return sum(self.spent)

    @classmethod
    def once(cls, seconds: float, num_bytes: int, *, done: bool) -> LoadTotals:
        """One piece of work."""
        place = bisect_left(SECONDS_BOUNDS, seconds)
        by_seconds = tuple(int(place == number) for number in range(len(SECONDS_BOUNDS) + 1))
        spent = tuple(seconds * count for count in by_seconds)
        return cls(int(done), int(not done), num_bytes if done else 0, by_seconds, spent)


@dataclass(frozen=True, slots=True)
class SourceStats:
    """What sources did.

    download: from a source's server to this machine, tries that failed on the way included. read: from disk (a cached
    download, or a local folder) into memory, verified, and packed meanwhile. disk_hits, disk_misses: downloads that the
    disk cache made needless, and the others. remembered_failures: references and contents whose failure is remembered
    now. failures_repeated: times that one was answered from memory.
    """

    download: LoadTotals = field(default_factory=LoadTotals)
    read: LoadTotals = field(default_factory=LoadTotals)
    disk_hits: int = 0
    disk_misses: int = 0
    remembered_failures: int = 0
    failures_repeated: int = 0

    def __add__(self, other: SourceStats) -> SourceStats:
        return SourceStats(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


@dataclass(frozen=True, slots=True)
class DiskCacheStats:
    """What is on disk now, brought by any process of this machine: bytes of ``budget_bytes``."""

    adapters: int
    bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Everything before the slots. sources: see there; failures are those of the store too.

    pack: from the files' bytes to a slab in the slots' layout. host: the cache of such slabs. disk: that of files.
    """

    sources: SourceStats
    pack: LoadTotals
    host: HostCacheStats
    disk: DiskCacheStats


class LoadMeter:
    """Counts one kind of work. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = LoadTotals()

    @property
    def totals(self) -> LoadTotals:
        return self._totals

    @contextlib.contextmanager
    def measure(self) -> Iterator[Measured]:
        """Count the block: as failed when it raises, otherwise as done with the ``bytes`` that it noted; not at all
        when it has to wait for host memory, since it is begun again."""
        started, work, done = time.perf_counter(), Measured(), False
        try:
            yield work
            done = True
        except HostMemoryFull:
            started = None
            raise
        finally:
            if started is not None:
                self.count(time.perf_counter() - started, work.bytes, done=done)

    def count(self, seconds: float, num_bytes: int, *, done: bool = True) -> None:
        """Count a piece of work that was measured elsewhere."""
        with self._lock:
            self._totals += LoadTotals.once(seconds, num_bytes, done=done)


@dataclass(slots=True)
class Measured:
    """A piece of work under way."""

    bytes: int = 0

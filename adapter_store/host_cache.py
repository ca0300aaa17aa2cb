"""Packed adapters in host memory, so that a reload into a slot needs neither disk nor network."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.eviction import EvictionPolicy, LeastRecentlyUsed
from adapter_store.host_arena import HostArena
from adapter_store.packed import PackedAdapter

ROOM_ALIGNMENT = 64  # bytes


class HostMemoryFull(Exception):
    """No room of ``nbytes`` now: everything is referenced, or others wait for room. Try again when some is released."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"host memory has no room for {nbytes} bytes now")
        self.nbytes = nbytes


@dataclass(frozen=True, slots=True)
class HostCacheStats:
    """Totals since the start, and what is held now. misses: adapters that were brought in from their source.

    bytes: taken by adapters and by those on their way, of ``budget_bytes``. referenced_bytes: of those, what may not
    be evicted now.
    """

    hits: int
    misses: int
    evictions: int
    adapters: int
    bytes: int
    referenced_bytes: int
    budget_bytes: int


@dataclass(slots=True, eq=False)
class _Region:
    """A piece of the arena: free (no adapter, no references), room being filled (no adapter, one), or an adapter's."""

    offset: int
    nbytes: int
    packed: PackedAdapter | None = None
    refs: int = 0

    @property
    def free(self) -> bool:
        return self.packed is None and self.refs == 0


class Room:
    """Room for one adapter, to be filled and kept, or cancelled."""

    def __init__(self, arena: HostArena, region: _Region, nbytes: int) -> None:
        self.nbytes = nbytes
        self._arena = arena
        self._region = region

    def slab(self, elements: int, dtype: torch.dtype) -> Tensor:
        """(elements,) to write the adapter to, with whatever was there before."""
        assert elements * dtype.itemsize == self.nbytes
        return self._arena.view(self._region.offset, elements, dtype)


class Allocation:
    """A slab in host memory for one adapter: in room that was reserved ahead, or when its size is known.

    A context manager: room that holds no adapter at the end is free again.
    """

    def __init__(self, cache: HostCache, dtype: torch.dtype, room: Room | None) -> None:
        self._cache = cache
        self._dtype = dtype
        self._room = room

    def __enter__(self) -> Allocation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._room is not None:
            self._cache.cancel(self._room)

    def slab(self, elements: int) -> Tensor:
        """(elements,) with whatever was there before. Raises HostMemoryFull."""
        nbytes = elements * self._dtype.itemsize
        if self._room is not None and self._room.nbytes != nbytes:
            self._cache.cancel(self._room)
            self._room = None
        if self._room is None:
            self._room = self._cache.reserve(nbytes)
        if self._room is None:
            raise HostMemoryFull(nbytes)
        return self._room.slab(elements, self._dtype)

    def keep(self, packed: PackedAdapter) -> PackedAdapter:
        """See ``HostCache.keep``."""
        assert self._room is not None
        room, self._room = self._room, None
        return self._cache.keep(room, packed)


class HostCache:
    """Adapters by digest in one arena of ``budget_bytes``, of which not a byte more is ever used. Thread-safe.

    What a caller has acquired stays until it is released. Room for another is made by evicting, of the neighbours
    that make up enough of it and that nobody refers to, those whose most valuable is the least valuable.
    """

    def __init__(self, budget_bytes: int, *, pin_memory: bool = False, eviction: EvictionPolicy | None = None) -> None:
        """pin_memory: page-locked, for copies to a GPU. Raises RuntimeError when so much memory cannot be had."""
        self.budget_bytes = budget_bytes
        self._arena = HostArena(budget_bytes, pin_memory=pin_memory)
        self._eviction = eviction or LeastRecentlyUsed()
        self._lock = threading.Lock()
        whole = budget_bytes - budget_bytes % ROOM_ALIGNMENT
        self._regions = [_Region(0, whole)] if whole else []  # by offset, covering the arena; no two free neighbours
        self._by_digest: dict[str, _Region] = {}
        self._hits = self._misses = self._evictions = 0
        #: Grows whenever there may be more room than before. Any thread may read it.
        self.releases = 0
        #: Called with a digest and whether it is held now, under the cache's lock: it must not block.
        self.on_change: Callable[[str, bool], None] | None = None
        #: Whether room goes only to those who waited for it. Set by whoever keeps the line.
        self.waited_only = False

    def acquire(self, digest: str) -> PackedAdapter | None:
        """The adapter, which stays until it is given to ``release``; or None."""
        with self._lock:
            region = self._by_digest.get(digest)
            if region is None:
                return None
            self._hits += 1
            region.refs += 1
            self._eviction.used(digest)
            return region.packed

    def share(self, packed: PackedAdapter) -> PackedAdapter:
        """One more reference to an adapter that the caller has one to."""
        with self._lock:
            region = self._by_digest[packed.digest]
            assert region.packed is packed
            assert region.refs > 0
            region.refs += 1
            return packed

    def release(self, packed: PackedAdapter) -> None:
        """Give one reference back. The slab must not be read any more: its memory may become another's."""
        with self._lock:
            region = self._by_digest[packed.digest]
            assert region.packed is packed
            assert region.refs > 0, "released more often than acquired"
            region.refs -= 1
            self._eviction.released(packed.digest)
            self.releases += region.refs == 0

    def reserve(self, nbytes: int, *, waited: bool = False) -> Room | None:
        """Room for an adapter, evicting what nobody refers to; None when there is none to be had."""
        size = -(-nbytes // ROOM_ALIGNMENT) * ROOM_ALIGNMENT
        with self._lock:
            if self.waited_only and not waited:
                return None
            window = self._window(size, {})
            if window is None:
                return None
            for region in window:
                if region.packed is not None:
                    self._drop(region, evicted=True)
                    self._evictions += 1
            first = window[0]
            at = self._regions.index(first)
            total = sum(region.nbytes for region in window)
            taken = _Region(first.offset, size, refs=1)
            rest = [_Region(first.offset + size, total - size)] if total > size else []
            self._regions[at : at + len(window)] = [taken, *rest]
            if rest:
                self._merge(rest[0])
            return Room(self._arena, taken, nbytes)

    def keep(self, room: Room, packed: PackedAdapter) -> PackedAdapter:
        """Hold what the room was filled with; the caller has a reference to what is returned.

        Where another load of the same content was faster that is the other's, and the room is free again.
        """
        with self._lock:
            self._misses += 1
            held = self._by_digest.get(packed.digest)
            if held is not None:
                self._free(room._region)
                held.refs += 1
                assert held.packed is not None
                return held.packed
            room._region.packed = packed
            self._by_digest[packed.digest] = room._region
            self._eviction.added(packed.digest, packed.nbytes, packed.load_seconds)
            self._changed(packed.digest, held=True)
            return packed

    def cancel(self, room: Room) -> None:
        """Give room back that was not filled."""
        with self._lock:
            self._free(room._region)

    def holders(self, nbytes: int, loose: Mapping[str, int]) -> list[str] | None:
        """What must be released before ``reserve`` can give such room, if of each digest in ``loose`` so many
        references could be: of the ways to make room the one with the least valuable; None when it is not enough."""
        size = -(-nbytes // ROOM_ALIGNMENT) * ROOM_ALIGNMENT
        with self._lock:
            window = self._window(size, loose)
            if window is None:
                return None
            return [region.packed.digest for region in window if region.packed is not None and region.refs]

    def remove(self, digest: str) -> bool:
        """Drop one adapter; False when it is not held or referred to."""
        with self._lock:
            region = self._by_digest.get(digest)
            if region is None or region.refs:
                return False
            self._drop(region, evicted=False)
            self._free(region)
            return True

    def clear(self) -> None:
        """Drop everything that nobody refers to."""
        with self._lock:
            for region in [region for region in self._by_digest.values() if region.refs == 0]:
                self._drop(region, evicted=False)
                self._free(region)

    def close(self) -> None:
        """Let go of the memory. No copy may be under way."""
        self.clear()
        self._arena.close()

    def digests(self) -> tuple[str, ...]:
        """What is held now."""
        with self._lock:
            return tuple(self._by_digest)

    def stats(self) -> HostCacheStats:
        """Counters so far."""
        with self._lock:
            return HostCacheStats(
                self._hits,
                self._misses,
                self._evictions,
                len(self._by_digest),
                sum(region.nbytes for region in self._regions if not region.free),
                sum(region.nbytes for region in self._regions if region.refs),
                self.budget_bytes,
            )

    def _window(self, size: int, loose: Mapping[str, int]) -> list[_Region] | None:
        """Neighbours that make up ``size`` bytes and may go, references in ``loose`` aside: the smallest free region
        that is large enough, else those whose most valuable is the least."""

        def worth(region: _Region) -> tuple[bool, float] | None:
            if region.packed is None:
                return None if region.refs else (False, -math.inf)
            if region.refs > loose.get(region.packed.digest, 0):
                return None
            return region.refs > 0, self._eviction.value(region.packed.digest)

        fitting = [region for region in self._regions if region.free and region.nbytes >= size]
        if fitting:
            return [min(fitting, key=lambda region: region.nbytes)]
        worths = [worth(region) for region in self._regions]
        best: tuple[tuple[bool, float], int, int] | None = None
        for start, first in enumerate(worths):
            if first is None:
                continue
            most, have, end = first, 0, start
            while have < size and end < len(worths):
                own = worths[end]
                if own is None:
                    break
                most, have, end = max(most, own), have + self._regions[end].nbytes, end + 1
            if have >= size and (best is None or (most, end - start) < (best[0], best[2] - best[1])):
                best = most, start, end
        return None if best is None else self._regions[best[1] : best[2]]

    def _drop(self, region: _Region, *, evicted: bool) -> None:
        assert region.packed is not None
        assert region.refs == 0
        digest, region.packed = region.packed.digest, None
        del self._by_digest[digest]
        self._eviction.removed(digest, evicted=evicted)
        self._changed(digest, held=False)

    def _changed(self, digest: str, *, held: bool) -> None:
        if self.on_change is not None:
            self.on_change(digest, held)

    def _free(self, region: _Region) -> None:
        region.refs = 0
        self.releases += 1
        self._merge(region)

    def _merge(self, region: _Region) -> None:
        """Make one of a free region and its free neighbours."""
        at = self._regions.index(region)
        start = at - 1 if at and self._regions[at - 1].free else at
        end = at + 2 if at + 1 < len(self._regions) and self._regions[at + 1].free else at + 1
        joined = self._regions[start:end]
        self._regions[start:end] = [_Region(joined[0].offset, sum(part.nbytes for part in joined))]

"""Packed adapters in host memory, so that a reload into a slot needs neither disk nor network."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from adapter_store.packed import PackedAdapter


@dataclass(frozen=True, slots=True)
class HostCacheStats:
    """Totals since the start, and what is held now. oversize: adapters larger than the whole budget."""

    hits: int
    misses: int
    evictions: int
    oversize: int
    adapters: int
    bytes: int


class HostCache:
    """Least recently used packed adapters by digest, never more than ``budget_bytes`` of them. Thread-safe.

    An adapter that a caller still holds may be dropped from here; its memory lives as long as the caller's reference.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._hits = self._misses = self._evictions = self._oversize = 0

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter, marked as just used, or None."""
        with self._lock:
            packed = self._entries.get(digest)
            if packed is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(digest)
            return packed

    def put(self, packed: PackedAdapter) -> None:
        """Keep the adapter, putting out the least recently used ones. One larger than the budget is not kept."""
        with self._lock:
            if packed.nbytes > self.budget_bytes:
                self._oversize += 1
                return
            old = self._entries.pop(packed.digest, None)
            if old is not None:
                self._bytes -= old.nbytes
            while self._bytes + packed.nbytes > self.budget_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.nbytes
                self._evictions += 1
            self._entries[packed.digest] = packed
            self._bytes += packed.nbytes

    def remove(self, digest: str) -> bool:
        """Drop one adapter; False when it is not held."""
        with self._lock:
            packed = self._entries.pop(digest, None)
            if packed is not None:
                self._bytes -= packed.nbytes
            return packed is not None

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def digests(self) -> tuple[str, ...]:
        """What is held now, least recently used first."""
        with self._lock:
            return tuple(self._entries)

    def stats(self) -> HostCacheStats:
        """Counters so far."""
        with self._lock:
            return HostCacheStats(
                self._hits, self._misses, self._evictions, self._oversize, len(self._entries), self._bytes
            )

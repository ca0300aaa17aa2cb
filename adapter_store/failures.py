"""What failed a moment ago, so that the same question is answered at once instead of being worked on again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable

from adapter_store.errors import AdapterError

_MAX_REMEMBERED = 16_384  # clients may make up names; a few hundred bytes each


class RecentFailures:
    """Adapter errors by what they are about, each for ``ttl_s``. Thread-safe."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[float, AdapterError]] = OrderedDict()  # oldest first
        self._repeated = 0

    def add(self, key: Hashable, error: AdapterError) -> None:
        """Remember a failure, without the frames that it passed through and what they held."""
        now = time.monotonic()
        with self._lock:
            self._drop_old(now)
            self._entries[key] = (now + self._ttl_s, error.named(error.adapter))
            self._entries.move_to_end(key)
            while len(self._entries) > _MAX_REMEMBERED:
                self._entries.popitem(last=False)

    def check(self, key: Hashable, name: str) -> None:
        """Raise what is remembered of ``key``, under the name that it was asked for now."""
        with self._lock:
            until, error = self._entries.get(key, (0.0, None))
            if error is None or until <= time.monotonic():
                return
            self._repeated += 1
        raise error.named(name)

    def holds(self, key: Hashable) -> bool:
        """Whether ``check`` would raise."""
        with self._lock:
            return self._entries.get(key, (0.0, None))[0] > time.monotonic()

    def forget(self, key: Hashable) -> None:
        """Let the next try happen."""
        with self._lock:
            self._entries.pop(key, None)

    @property
    def repeated(self) -> int:
        """Times that ``check`` raised."""
        return self._repeated

    def __len__(self) -> int:
        with self._lock:
            self._drop_old(time.monotonic())
            return len(self._entries)

    def _drop_old(self, now: float) -> None:
        while self._entries and next(iter(self._entries.values()))[0] <= now:
            self._entries.popitem(last=False)

"""Work that several threads want at once, done once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Calls with equal keys that overlap in time share one execution and its result or exception. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[T]] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of ``work``, ours or that of a call already running for ``key``. Raises what it raises."""
        with self._lock:
            future: Future[Any] | None = self._running.get(key)
            leader = future is None
            if future is None:
                future = self._running[key] = Future()
        if not leader:
            return future.result()
        try:
            result = work()
        except BaseException as error:
            self._forget(key)
            future.set_exception(error)
            del future  # else the error's frames hold the future, which holds the error
            raise
        self._forget(key)
        future.set_result(result)
        return result

    def running(self, key: Hashable) -> bool:
        """Whether a call for ``key`` is under way."""
        with self._lock:
            return key in self._running

    def _forget(self, key: Hashable) -> None:
        with self._lock:
            del self._running[key]

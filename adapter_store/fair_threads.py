"""Threads that wait for other machines, shared so that one machine's silence leaves threads for the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class FairThreads:
    """At most ``threads`` pieces of work at once, and at most ``share`` of one owner; the others of that owner wait for
    theirs, in order, and hold up nobody else's. Thread-safe.

    Who the owners are is the caller's choice: whoever can be slow without the others, such as ``AdapterRef.owner``.
    """

    def __init__(self, threads: int, share: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._share = share
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[Callable[[], None]]] = {}
        self._closed = False

    def submit(self, owner: str, work: Callable[..., T], *args: Any) -> Future[T]:
        """Have ``work`` done. Raises RuntimeError after ``close``."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._done(owner)

        with self._lock:
            if self._closed:
                raise RuntimeError("these threads are closed")
            if self._running.get(owner, 0) < self._share:
                self._running[owner] = self._running.get(owner, 0) + 1
                self._pool.submit(run)
            else:
                self._waiting.setdefault(owner, deque()).append(run)
        return future

    def close(self) -> None:
        """Begin no more work; what is under way ends with its own limits."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, owner: str) -> None:
        with self._lock:
            waiting = self._waiting.get(owner)
            if waiting and not self._closed:
                self._pool.submit(waiting.popleft())
                return
            self._waiting.pop(owner, None)
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]

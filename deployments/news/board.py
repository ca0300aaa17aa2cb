"""A notice board with a long poll: the latest value of every key, and who has read how far."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Generic, TypeVar

T = TypeVar("T")
Cursor = tuple[str, int]  # (epoch, sequence)

ABSENT_SECONDS = 3.0  # a reader that has not come back for so long is gone


class Board(Generic[T]):
    """Values by key for one asyncio actor.

    A cursor is ``(epoch, sequence)``; a board that was made anew has a new epoch, so a reader that comes with an old
    cursor gets everything.
    """

    def __init__(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._sequence = 0
        self._entries: dict[str, tuple[int, T]] = {}
        self._changed = asyncio.Condition()
        self._read: dict[str, int] = {}  # reader -> sequence it has taken in
        self._away: dict[str, float] = {}  # reader that is not waiting here now -> since when

    async def put(self, key: str, value: T) -> int:
        """Replace the value of ``key``; returns the sequence number of the change."""
        async with self._changed:
            self._sequence += 1
            self._entries[key] = (self._sequence, value)
            self._changed.notify_all()
            return self._sequence

    def drop(self, key: str) -> None:
        """Forget a key; readers are not told."""
        self._entries.pop(key, None)

    async def watch(self, cursor: Cursor | None, wait_s: float, reader: str = "") -> tuple[Cursor, list[T]]:
        """Values newer than ``cursor``; waits up to ``wait_s`` seconds for one, then answers with none.

        Without a cursor of this board the answer is all there is, at once. Whoever comes with a cursor has taken in
        what that cursor was given with: see ``spread``.
        """
        if cursor is None or cursor[0] != self._epoch:
            since, wait_s = -1, 0.0
        else:
            since = cursor[1]
        async with self._changed:
            if reader:
                self._read[reader] = since
                self._away.pop(reader, None)
                self._changed.notify_all()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._sequence > since), wait_s)
            except TimeoutError:
                pass
            finally:
                if reader:
                    self._away[reader] = time.monotonic()
        values = [value for sequence, value in self._entries.values() if sequence > since]
        return (self._epoch, self._sequence), values

    async def spread(self, sequence: int, wait_s: float) -> bool:
        """Wait until every reader has taken in the change ``sequence``; False when some had not after ``wait_s``."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._all_read(sequence)), wait_s)
            except TimeoutError:
                return False
        return True

    def _all_read(self, sequence: int) -> bool:
        now = time.monotonic()
        for reader in [reader for reader, since in self._away.items() if now - since > ABSENT_SECONDS]:
            del self._away[reader], self._read[reader]
        return all(read >= sequence for read in self._read.values())

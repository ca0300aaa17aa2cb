"""Work that goes on beside requests, in a task of its own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait until it is over, however it ends. None: it was never begun."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Background(ABC):
    """What has one task that goes on from ``start`` to ``close``."""

    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, on the running loop. A second call does nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop, and wait until that is so."""
        await end(self._task)

    @abstractmethod
    async def _run(self) -> None: ...

"""Work that goes on beside requests, in a task of its own."""

from __future__ import annotations

import asyncio
from typing import Any


async def end(task: asyncio.Task[Any] | None) -> None:
    """Cancel a task and wait until it is over, however it ends. None: it was never begun."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

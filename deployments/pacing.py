"""Fewer, larger stream items: one costs far more to carry between processes than a token costs to make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from engine.request import GenerationChunk


@dataclass(frozen=True, slots=True)
class StreamPacing:
    """items_per_s: what a replica sends at most, over all its streams. max_delay_s: longest a token is held for it."""

    items_per_s: float
    max_delay_s: float

    def __post_init__(self) -> None:
        if self.items_per_s <= 0:
            raise ValueError(f"stream_items_per_s is {self.items_per_s!r} but must be above 0")
        if self.max_delay_s < 0:
            raise ValueError(f"stream_max_delay_s is {self.max_delay_s!r} but must be 0 or more")

    def delay_s(self, streams: int) -> float:
        """Least time between two items of one stream while ``streams`` are open."""
        return min(self.max_delay_s, streams / self.items_per_s)


async def paced(
    source: AsyncGenerator[GenerationChunk], delay_s: Callable[[], float]
) -> AsyncGenerator[GenerationChunk]:
    """The same stream, read only every ``delay_s()`` seconds after its first chunk.

    An engine merges what nobody has read yet into one chunk, so reading less often is all it takes.
    """
    async for chunk in source:
        yield chunk
        if chunk.finish_reason is None:
            await asyncio.sleep(delay_s())


async def together(source: AsyncGenerator[GenerationChunk]) -> AsyncGenerator[GenerationChunk]:
    """The whole stream as one chunk."""
    whole: GenerationChunk | None = None
    async for chunk in source:
        whole = chunk if whole is None else whole + chunk
    if whole is not None:
        yield whole

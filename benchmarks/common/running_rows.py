"""Rows that decode while something else happens to their engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType

from benchmarks.common.timeline import Timeline
from engine.engine import Engine
from engine.request import GenerationRequest


class RunningRows:
    """``async with RunningRows(engine, requests, settled) as rows``: all decode, ``settled`` tokens in, until the end.

    Their requests must have more tokens to make than the measurement lasts: one that ends before raises RuntimeError.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], settled: int) -> None:
        self.lines = [Timeline(time.perf_counter()) for _ in requests]
        self._engine = engine
        self._requests = requests
        self._settled = settled
        self._token = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> RunningRows:
        self._tasks = [
            asyncio.create_task(self._read(request, line))
            for request, line in zip(self._requests, self.lines, strict=True)
        ]
        for line in self.lines:
            await self._reach(line, self._settled)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def steps(self, count: int) -> None:
        """Return when the first row has that many more tokens."""
        await self._reach(self.lines[0], len(self.lines[0].tokens) + count)

    def gaps_ms(self, start: float, end: float) -> list[float]:
        """All rows' times between tokens from ``start`` to ``end``, in milliseconds."""
        return [gap for line in self.lines for gap in line.gaps_ms(start, end)]

    async def _read(self, request: GenerationRequest, line: Timeline) -> None:
        async for chunk in self._engine.generate(request):
            line.tokens += [time.perf_counter()] * (chunk.completion_tokens - len(line.tokens))
            self._token.set()

    async def _reach(self, line: Timeline, count: int) -> None:
        while len(line.tokens) < count:
            self._token.clear()
            news = asyncio.create_task(self._token.wait())
            await asyncio.wait((news, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise RuntimeError("a running row ended before the measurement: give it more tokens to make")

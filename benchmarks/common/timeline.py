"""When the tokens of one request in an engine came."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.request import GenerationRequest


@dataclass(slots=True)
class Timeline:
    """When one request was sent and when each of its tokens arrived, in seconds of ``time.perf_counter``."""

    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first token."""
        return (self.tokens[0] - self.sent) * 1e3

    def gaps_ms(self, start: float, end: float) -> list[float]:
        """Milliseconds between tokens, of those waits that lie in ``start`` to ``end`` at least in part."""
        return [
            (later - earlier) * 1e3
            for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)
            if later > start and earlier < end
        ]


async def follow(engine: Engine, request: GenerationRequest) -> Timeline:
    """Run one request to its end."""
    line = Timeline(time.perf_counter())
    async for chunk in engine.generate(request):
        line.tokens += [time.perf_counter()] * (chunk.completion_tokens - len(line.tokens))
    return line

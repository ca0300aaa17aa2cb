"""One client request under way: its choices, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from math import inf
from statistics import fmean

from deployments.api.tool_formats import ToolFormat
from deployments.protocol.completions import Echo
from engine.request import GenerationChunk


@dataclass(slots=True)
class Generation:
    """The choices of one request (prompts x n, prompt by prompt), each a stream of chunks.

    id, created, model, fingerprint: what the answer says. n: streams of each prompt, of which the answer has the
    ``kept`` likeliest, all when None. echoes: by choice, the prompt that goes before it. token_bytes: the bytes of a
    token id, None where the tokenizer does not tell. tool_format: how the model writes down calls. ended: called once
    at the end, however it came, with the tokens of the prompts and of the completions so far.
    """

    id: str
    created: int
    model: str
    streams: Sequence[AsyncGenerator[GenerationChunk]]
    n: int = 1
    kept: int | None = None
    fingerprint: str = ""
    echoes: Sequence[Echo] = ()
    token_bytes: Callable[[int], bytes | None] = lambda _: None
    tool_format: ToolFormat | None = None
    ended: Callable[[int, int], None] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _spent: dict[int, tuple[int, int]] = field(default_factory=dict)
    _firsts: list[GenerationChunk] = field(default_factory=list)

    async def begin(self) -> None:
        """Wait for the first chunk of every choice, so that an error still can become a status code.

        Raises what the streams raise; the others are closed then.
        """
        tasks = [asyncio.ensure_future(anext(stream)) for stream in self.streams]
        try:
            self._firsts = list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.aclose()
            raise

    async def chunks(self) -> AsyncGenerator[tuple[int, GenerationChunk]]:
        """``(choice index, chunk)`` as they come, after ``begin``. Closing this generator closes the streams."""
        try:
            if len(self.streams) == 1:
                merged = _single(self._firsts[0], self.streams[0])
            else:
                merged = _merged(self._firsts, self.streams)
            async with aclosing(merged):
                async for index, chunk in merged:
                    self._spent[index] = chunk.prompt_tokens, chunk.completion_tokens
                    if chunk.finish_reason is not None:
                        self.completion_tokens += chunk.completion_tokens
                        if index % self.n == 0:  # every prompt counts once
                            self.prompt_tokens += chunk.prompt_tokens
                    yield index, chunk
        finally:
            await self.aclose()

    async def finished(self) -> list[GenerationChunk]:
        """Every choice whole, in order; the likeliest of each prompt, the best one first, where there are more."""
        whole: dict[int, GenerationChunk] = {}
        async with aclosing(self.chunks()) as chunks:
            async for index, chunk in chunks:
                whole[index] = whole[index] + chunk if index in whole else chunk
        made = [whole[index] for index in range(len(self.streams))]
        if self.kept is None:
            return made
        prompts = (made[first : first + self.n] for first in range(0, len(made), self.n))
        return [chunk for one in prompts for chunk in sorted(one, key=_mean_logprob, reverse=True)[: self.kept]]

    @property
    def choices(self) -> int:
        """How many the answer has."""
        return len(self.streams) // self.n * (self.kept or self.n)

    def echo(self, index: int) -> Echo:
        """The prompt that goes before this choice."""
        return self.echoes[index] if self.echoes else Echo()

    async def aclose(self) -> None:
        """Stop every choice that still runs."""
        for stream in self.streams:
            await stream.aclose()
        ended, self.ended = self.ended, None
        if ended is not None:
            prompts = sum(prompt for index, (prompt, _) in self._spent.items() if index % self.n == 0)
            ended(prompts, sum(completion for _, completion in self._spent.values()))


def _mean_logprob(chunk: GenerationChunk) -> float:
    return fmean(token.logprob for token in chunk.logprobs) if chunk.logprobs else -inf


async def _single(
    first: GenerationChunk, stream: AsyncIterator[GenerationChunk]
) -> AsyncGenerator[tuple[int, GenerationChunk]]:
    yield 0, first
    async for chunk in stream:
        yield 0, chunk


async def _merged(
    firsts: Sequence[GenerationChunk], streams: Sequence[AsyncIterator[GenerationChunk]]
) -> AsyncGenerator[tuple[int, GenerationChunk]]:
    """All streams side by side. The first error ends them all."""
    ready: asyncio.Queue[tuple[int, GenerationChunk] | Exception | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for chunk in streams[index]:
                ready.put_nowait((index, chunk))
        except Exception as error:  # raised again below, by the reader
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    for index, chunk in enumerate(firsts):
        yield index, chunk
    pumps = [asyncio.ensure_future(pump(index)) for index in range(len(streams))]
    running = len(pumps)
    try:
        while running:
            item = await ready.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

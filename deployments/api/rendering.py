"""Generations in OpenAI's shapes: a whole answer, or the events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from deployments.api.generation import Generation
from deployments.protocol import chat, completions
from deployments.protocol.chat import ChatBody
from deployments.protocol.common import usage
from deployments.protocol.completions import CompletionBody
from engine.request import GenerationChunk


class Rendering(Protocol):
    """One endpoint's shapes for one generation."""

    def answer(self, chunks: list[GenerationChunk]) -> dict[str, Any]:
        """The whole answer from finished choices, without usage."""
        ...

    def events(self, index: int, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """What a stream says when this chunk of this choice arrives."""
        ...

    def empty(self) -> dict[str, Any]:
        """An event without choices, for usage."""
        ...


class CompletionRendering:
    """``/v1/completions``."""

    def __init__(self, generation: Generation, body: CompletionBody) -> None:
        self._generation = generation
        self._logprobs = body.logprobs is not None
        self._offsets = [len(generation.echo(index)) for index in range(len(generation.streams))]
        self._begun: set[int] = set()

    def answer(self, chunks: list[GenerationChunk]) -> dict[str, Any]:
        """See ``Rendering``."""
        return self._envelope([self._choice(index, chunk) for index, chunk in enumerate(chunks)])

    def events(self, index: int, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """See ``Rendering``."""
        yield self._envelope([self._choice(index, chunk)])

    def empty(self) -> dict[str, Any]:
        """See ``Rendering``."""
        return self._envelope([])

    def _choice(self, index: int, chunk: GenerationChunk) -> dict[str, Any]:
        text = chunk.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._generation.echo(index) + text
        logprobs = None
        if self._logprobs:
            logprobs = completions.logprobs_object(chunk.logprobs, self._offsets[index])
            self._offsets[index] += sum(len(token.text) for token in chunk.logprobs)
        return completions.choice(index, text, chunk.finish_reason, chunk.stop_reason, logprobs)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        generation = self._generation
        return completions.envelope(generation.id, generation.created, generation.model, choices)


class ChatRendering:
    """``/v1/chat/completions``."""

    def __init__(self, generation: Generation, body: ChatBody) -> None:
        self._generation = generation
        self._logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def answer(self, chunks: list[GenerationChunk]) -> dict[str, Any]:
        """See ``Rendering``."""
        choices = [
            chat.message_choice(index, chunk.text, chunk.finish_reason, chunk.stop_reason, self._logs(chunk))
            for index, chunk in enumerate(chunks)
        ]
        return self._envelope(choices, streamed=False)

    def events(self, index: int, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """See ``Rendering``. The first event of a choice says its role."""
        if index not in self._begun:
            self._begun.add(index)
            yield self._envelope([chat.delta_choice(index, {"role": "assistant", "content": ""})], streamed=True)
        if chunk.text or chunk.logprobs:
            delta = chat.delta_choice(index, {"content": chunk.text}, logprobs=self._logs(chunk))
            yield self._envelope([delta], streamed=True)
        if chunk.finish_reason is not None:
            last = chat.delta_choice(index, {}, chunk.finish_reason, chunk.stop_reason)
            yield self._envelope([last], streamed=True)

    def empty(self) -> dict[str, Any]:
        """See ``Rendering``."""
        return self._envelope([], streamed=True)

    def _logs(self, chunk: GenerationChunk) -> dict[str, Any] | None:
        return chat.logprobs_object(chunk.logprobs, self._generation.token_bytes) if self._logprobs else None

    def _envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        generation = self._generation
        return chat.envelope(generation.id, generation.created, generation.model, choices, streamed=streamed)


def rendering_for(generation: Generation, body: CompletionBody | ChatBody) -> Rendering:
    """The shapes of the endpoint that this body belongs to."""
    if isinstance(body, ChatBody):
        return ChatRendering(generation, body)
    return CompletionRendering(generation, body)


async def whole(generation: Generation, body: CompletionBody | ChatBody) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    chunks = await generation.finished()
    answer = rendering_for(generation, body).answer(chunks)
    return {**answer, "usage": usage(generation.prompt_tokens, generation.completion_tokens)}


async def events(generation: Generation, body: CompletionBody | ChatBody) -> AsyncGenerator[dict[str, Any]]:
    """The events of a request that streams; usage at the end when it was asked for."""
    rendering = rendering_for(generation, body)
    pending: dict[str, Any] = {"usage": None} if body.include_usage else {}
    async with aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            for event in rendering.events(index, chunk):
                yield {**event, **pending}
    if body.include_usage:
        yield {**rendering.empty(), "usage": usage(generation.prompt_tokens, generation.completion_tokens)}

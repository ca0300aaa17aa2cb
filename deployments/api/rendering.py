"""Generations in OpenAI's shapes: a whole answer, or the events of a stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from deployments.api.generation import Generation
from deployments.api.tool_calls import CallDelta, NamedCall, Piece, ToolCallParser
from deployments.api.tool_formats import LIST, ToolFormat
from deployments.protocol import chat, completions
from deployments.protocol.chat import ChatBody
from deployments.protocol.common import prompt_logprobs_list, usage
from deployments.protocol.completions import CompletionBody
from deployments.protocol.tools import begun_call, call_arguments, call_object
from engine.request import GenerationChunk, TokenLogprob

CallReader = ToolCallParser | NamedCall


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
        self._logprobs, self._prompt_logprobs = body.logprobs, body.prompt_logprobs
        self._offsets = [len(generation.echo(index).text) for index in range(generation.choices)]
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
        text, echo = chunk.text, self._generation.echo(index)
        if index not in self._begun:
            self._begun.add(index)
            text = echo.text + text
        logprobs, of_prompt = None, None
        if self._logprobs is not None:
            logprobs = completions.logprobs_object(chunk, echo, self._offsets[index], self._logprobs)
            self._offsets[index] += sum(len(token.text) for token in chunk.logprobs)
        if self._prompt_logprobs is not None:
            of_prompt = prompt_logprobs_list(chunk.prompt_logprobs, self._prompt_logprobs)
        return completions.choice(index, text, chunk.finish_reason, chunk.stop_reason, logprobs, of_prompt)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        generation = self._generation
        return completions.envelope(
            generation.id, generation.created, generation.model, generation.fingerprint, choices
        )


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
        return chat.envelope(
            generation.id, generation.created, generation.model, generation.fingerprint, choices, streamed=streamed
        )


class ToolRendering(ChatRendering):
    """The same for an answer that may hold calls of functions."""

    def __init__(self, generation: Generation, body: ChatBody, reader: Callable[[], CallReader]) -> None:
        """reader: makes the one of a choice."""
        super().__init__(generation, body)
        self._readers = [reader() for _ in range(generation.choices)]
        self._untold: dict[int, list[TokenLogprob]] = defaultdict(list)  # of tokens that are no piece yet
        self._new_call_id = (generation.tool_format or LIST).new_call_id
        self._most_calls = 1 if body.parallel_tool_calls is False else None
        self._called = "stop" if body.named_function else "tool_calls"

    def answer(self, chunks: list[GenerationChunk]) -> dict[str, Any]:
        """See ``Rendering``."""
        return self._envelope([self._message(index, chunk) for index, chunk in enumerate(chunks)], streamed=False)

    def _message(self, index: int, chunk: GenerationChunk) -> dict[str, Any]:
        content, names, arguments = "", [], []
        for piece in self._pieces(index, chunk):
            match piece:
                case str():
                    content += piece
                case CallDelta(name=str(name)):
                    names.append(name)
                    arguments.append("")
                case CallDelta():
                    arguments[-1] += piece.arguments
        calls = [call_object(self._new_call_id(), *call) for call in zip(names, arguments, strict=True)]
        finish = self._finish_reason(index, chunk)
        return chat.message_choice(
            index, content or (None if calls else ""), finish, chunk.stop_reason, self._logs(chunk), calls
        )

    def events(self, index: int, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """See ``Rendering``. Log probabilities go with the first delta that their tokens are in."""
        if index not in self._begun:
            self._begun.add(index)
            yield self._envelope([chat.delta_choice(index, {"role": "assistant", "content": None})], streamed=True)
        self._untold[index] += chunk.logprobs
        for piece in self._pieces(index, chunk):
            delta = chat.delta_choice(index, self._delta(piece), logprobs=self._told(index))
            yield self._envelope([delta], streamed=True)
        if chunk.finish_reason is not None:
            finish = self._finish_reason(index, chunk)
            last = chat.delta_choice(index, {}, finish, chunk.stop_reason, self._told(index))
            yield self._envelope([last], streamed=True)

    def _pieces(self, index: int, chunk: GenerationChunk) -> list[Piece]:
        reader = self._readers[index]
        pieces = reader.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += reader.finish()
        most = self._most_calls
        return [piece for piece in pieces if isinstance(piece, str) or most is None or piece.index < most]

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, str):
            return {"content": piece}
        if piece.name is not None:
            return begun_call(piece.index, self._new_call_id(), piece.name)
        return call_arguments(piece.index, piece.arguments)

    def _finish_reason(self, index: int, chunk: GenerationChunk) -> str | None:
        called = self._readers[index].calls and chunk.finish_reason == "stop"
        return self._called if called else chunk.finish_reason

    def _told(self, index: int) -> dict[str, Any] | None:
        untold = self._untold.pop(index, [])
        return chat.logprobs_object(untold, self._generation.token_bytes) if self._logprobs and untold else None


def rendering_for(generation: Generation, body: CompletionBody | ChatBody) -> Rendering:
    """The shapes of the endpoint that this body belongs to."""
    if not isinstance(body, ChatBody):
        return CompletionRendering(generation, body)
    reader = _call_reader(body, generation.tool_format)
    return ChatRendering(generation, body) if reader is None else ToolRendering(generation, body, reader)


def _call_reader(body: ChatBody, form: ToolFormat | None) -> Callable[[], CallReader] | None:
    """What makes a reader of this answer's calls; None where it is content and nothing else."""
    if not body.calls_tools:
        return None
    if (named := body.named_function) is not None:
        return partial(NamedCall, named.name)
    form = LIST if body.tool_choice == "required" else form
    names = [function.name for function in body.functions()]
    return None if form is None else partial(ToolCallParser, form, names)


async def whole(generation: Generation, body: CompletionBody | ChatBody) -> dict[str, Any]:
    """The answer of a request that does not stream."""
    chunks = await generation.finished()
    answer = rendering_for(generation, body).answer(chunks)
    if isinstance(body, ChatBody) and body.prompt_logprobs is not None:  # all choices are of one prompt
        answer["prompt_logprobs"] = prompt_logprobs_list(chunks[0].prompt_logprobs, body.prompt_logprobs)
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

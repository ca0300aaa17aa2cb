"""Generations in LoRAX's shapes: a whole answer, the events of a stream, and headers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from statistics import fmean
from typing import Any, Literal
from urllib.parse import quote

from deployments.api.generation import Generation
from deployments.protocol.errors import ApiError
from deployments.protocol.lorax import GenerateBody, LoraxCompletion
from engine.request import GenerationChunk, TokenLogprob
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer

FinishReason = Literal["length", "eos_token", "stop_sequence"]
_CONTEXT = 16  # tokens of the prompt that a decoder may look at


class Tokens:
    """The tokens of one completion, one by one, with the text that each brings. Their texts together are the
    completion's, the stop string at its end included, as LoRAX has it; those of special tokens apart."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], alternatives: int | None) -> None:
        """alternatives: how many likeliest tokens each is told with; None for none at all."""
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, prompt[-_CONTEXT:])
        self._alternatives = alternatives
        self.text = ""

    def of(self, chunk: GenerationChunk) -> Iterator[dict[str, Any]]:
        """Those that a chunk brought."""
        last = len(chunk.token_ids) - 1
        for number, (token_id, drawn) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
            text = self._stream.push(token_id)
            if number == last and chunk.finish_reason is not None:
                text += self._stream.flush()
            self.text += text
            yield self._token(drawn, text)

    def _token(self, drawn: TokenLogprob, text: str) -> dict[str, Any]:
        special = not text and is_special(self._tokenizer, drawn.token_id)
        token: dict[str, Any] = {
            "id": drawn.token_id,
            "text": drawn.text if special else text,
            "logprob": drawn.logprob,
            "special": special,
            "skipped": False,
        }
        if self._alternatives is not None:
            likely = drawn.top[: self._alternatives]
            token["alternative_tokens"] = [{"id": id_, "text": name, "logprob": value} for id_, value, name in likely]
        return token


def is_special(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether the token is not part of any text."""
    return bool(tokenizer.token_text(token_id)) and not tokenizer.decode([token_id])


class LoraxRendering:
    """One request's answer."""

    def __init__(self, body: GenerateBody, completion: LoraxCompletion, tokenizer: Tokenizer) -> None:
        """completion: what was made of ``body``, with a prompt of tokens."""
        self._asked = body.parameters
        self._before = body.inputs if body.parameters.return_full_text else ""
        (prompt,) = completion.prompts()
        assert not isinstance(prompt, str)
        self._prompt = prompt
        self._seed = completion.seed if body.parameters.samples else None
        self._tokenizer = tokenizer

    def answer(self, chunks: Sequence[GenerationChunk]) -> tuple[dict[str, Any], GenerationChunk]:
        """The whole answer, and the completion that it is: the likeliest of ``chunks``, which have ended."""
        rendered = [self._sequence(chunk, number) for number, chunk in enumerate(chunks)]
        best = max(range(len(chunks)), key=lambda number: fmean(token.logprob for token in chunks[number].logprobs))
        text, details = rendered.pop(best)
        answer: dict[str, Any] = {"generated_text": text}
        if self._asked.details or self._asked.decoder_input_details:
            answer["details"] = {**details, "prompt_tokens": chunks[best].prompt_tokens, "skipped_tokens": 0}
            if rendered:
                answer["details"]["best_of_sequences"] = [{"generated_text": t, **others} for t, others in rendered]
        return answer, chunks[best]

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """An event for each token; the last one has the whole text, and details where they were asked for."""
        tokens = self._tokens()
        async with aclosing(generation.chunks()) as chunks:
            async for _, chunk in chunks:
                reason = None if chunk.finish_reason is None else finish_reason(chunk)
                made = list(tokens.of(chunk))
                for number, token in enumerate(made, 1):
                    event: dict[str, Any] = {"token": token, "generated_text": None, "details": None}
                    if reason is not None and number == len(made):
                        event["generated_text"] = self._before + tokens.text
                        event["details"] = self._stream_details(chunk, reason) if self._asked.details else None
                    yield event

    def _stream_details(self, chunk: GenerationChunk, reason: FinishReason) -> dict[str, Any]:
        return {
            "finish_reason": reason,
            "prompt_tokens": chunk.prompt_tokens,
            "generated_tokens": chunk.completion_tokens,
            "seed": self._seed,
        }

    def _sequence(self, chunk: GenerationChunk, number: int) -> tuple[str, dict[str, Any]]:
        reason, tokens = finish_reason(chunk), self._tokens()
        made = list(tokens.of(chunk))
        return self._before + tokens.text, {
            "finish_reason": reason,
            "generated_tokens": chunk.completion_tokens,
            "seed": None if self._seed is None else (self._seed + number) % 2**63,
            "prefill": self._prefill(chunk),
            "tokens": made,
        }

    def _prefill(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        if not self._asked.decoder_input_details:
            return []
        return [
            {"id": id_, "text": self._tokenizer.token_text(id_), "logprob": None if one is None else one.logprob}
            for id_, one in zip(self._prompt, chunk.prompt_logprobs, strict=True)
        ]

    def _tokens(self) -> Tokens:
        return Tokens(self._tokenizer, self._prompt, self._asked.return_k_alternatives)


def finish_reason(chunk: GenerationChunk) -> FinishReason:
    """LoRAX's word for it. Raises ApiError for a completion that was cut off."""
    if chunk.finish_reason == "abort" or not chunk.token_ids:
        raise ApiError(500, "the generation was cut off before its end", code="incomplete")
    if chunk.finish_reason == "length":
        return "length"
    return "eos_token" if chunk.stop_reason is None else "stop_sequence"


def stream_headers(body: GenerateBody, base_model: str) -> dict[str, str]:
    """Headers that are known before anything is generated."""
    asked = body.parameters
    headers = {
        "x-compute-type": "optimized",
        "x-compute-characters": str(len(body.inputs)),
        "x-model-id": _header(base_model),
    }
    merged = asked.merged_adapters
    ids = [id_ for id_ in (merged.ids if merged else [asked.adapter_id or ""]) if id_]
    if ids:
        headers["x-adapter-id"] = _header(",".join(ids))
    if ids and asked.adapter_source:
        headers["x-adapter-source"] = _header(asked.adapter_source)
    return headers


def answer_headers(body: GenerateBody, base_model: str, chunk: GenerationChunk, total_s: float) -> dict[str, str]:
    """Those and what is known at the end. Times are in whole milliseconds, as LoRAX has them.

    total_s: from when the request came. What the engine did not spend of it (looking up, tokenizing, the way there and
    back) is the time of validation.
    """
    generated, headers = chunk.completion_tokens, stream_headers(body, base_model)
    headers |= {
        "x-prompt-tokens": str(chunk.prompt_tokens),
        "x-generated-tokens": str(generated),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(chunk.prompt_tokens + generated),
    }
    times = {"compute-time": total_s, "total-time": total_s}
    if (spent := chunk.timings) is not None:
        queue_s, inference_s = spent.adapter_s + spent.queue_s, spent.prefill_s + spent.decode_s
        times |= {
            "validation-time": max(total_s - queue_s - inference_s, 0.0),
            "queue-time": queue_s,
            "inference-time": inference_s,
            "time-per-token": inference_s / max(generated, 1),
            "time-to-first-token": spent.prefill_s,
            "time-per-output-token": spent.decode_s / max(generated - 1, 1),
        }
    return headers | {f"x-{name}": str(int(1000 * seconds)) for name, seconds in times.items()}


def _header(text: str) -> str:
    """What clients and operators named, as a header may say it."""
    return quote(text, safe="/:@,.-_~+=&!*()[] ")

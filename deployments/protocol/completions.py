"""``POST /v1/completions``: what comes in and what goes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, model_validator

from deployments.protocol.common import _UNSUPPORTED, GenerationBody
from deployments.protocol.errors import invalid
from deployments.protocol.prompts import Prompts, each_prompt
from engine.request import SamplingParams, TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this endpoint


class CompletionBody(GenerationBody):
    """The request body."""

    unsupported_fields = {**_UNSUPPORTED, "suffix": ("",)}  # noqa: RUF012

    prompt: Prompts
    echo: bool | None = Field(None, description="Put the prompt before each completion.")
    best_of: int | None = Field(None, ge=1, description="Make so many of each prompt and answer with the n likeliest.")
    logprobs: int | None = Field(None, description="Log probabilities of that many likeliest tokens, 0 to 20.")

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "echo together with logprobs is not supported: ask for one of them")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise invalid("best_of", f"best_of is {self.best_of} but must be at least n, {self.n}")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise invalid("best_of", "best_of above n is not possible with stream=true: the best is known at the end")
        return self

    @property
    def candidates(self) -> int:
        """See ``GenerationBody``."""
        return self.best_of or self.n or 1

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, as text or as token ids."""
        return each_prompt(self.prompt)

    def sampling_params(self) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest naming the field that is out of range."""
        wanted = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        chooses = self.candidates > (self.n or 1)  # by log probability
        return self.sampling(max_tokens=wanted, logprobs=0 if chooses and self.logprobs is None else self.logprobs)


def logprobs_object(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, list[Any]]:
    """OpenAI's legacy ``logprobs``: parallel lists. ``offset``: characters of the text before these tokens.

    The chosen token is always among the top ones, so there may be one more than was asked for.
    """
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {**{text: value for _, value, text in token.top}, token.text: token.logprob} for token in tokens
        ],
        "text_offset": offsets,
    }


def choice(
    index: int,
    text: str,
    finish_reason: str | None,
    stop_reason: str | int | None,
    logprobs: dict[str, list[Any]] | None,
) -> dict[str, Any]:
    """One entry of ``choices``, the same in a stream and in a whole answer."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def envelope(
    request_id: str, created: int, model: str, fingerprint: str, choices: list[dict[str, Any]]
) -> dict[str, Any]:
    """The answer round ``choices``, the same in a stream and in a whole answer."""
    return {
        "id": request_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
    }

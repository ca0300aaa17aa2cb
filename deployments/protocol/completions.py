"""``POST /v1/completions``: what comes in and what goes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from pydantic import Field, model_validator

from deployments.protocol.common import _UNSUPPORTED, GenerationBody, in_range
from deployments.protocol.errors import invalid
from deployments.protocol.prompts import Prompts, each_prompt
from engine.request import GenerationChunk, SamplingParams, TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this endpoint


class CompletionBody(GenerationBody):
    """The request body."""

    unsupported_fields = {**_UNSUPPORTED, "suffix": ("",)}  # noqa: RUF012

    prompt: Prompts
    max_tokens: int | None = Field(
        None, description="0 only with echo or prompt_logprobs.", json_schema_extra=in_range(0)
    )
    echo: bool | None = Field(None, description="Put the prompt before each completion.")
    best_of: int | None = Field(None, ge=1, description="Make so many of each prompt and answer with the n likeliest.")
    logprobs: int | None = Field(None, description="Log probabilities of that many likeliest tokens, 0 to 20.")

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionBody:
        least = 0 if self.echo or self.prompt_logprobs is not None else 1
        if self.max_tokens is not None and self.max_tokens < least:
            raise invalid(
                "max_tokens",
                f"max_tokens is {self.max_tokens} but must be 1 or more, or 0 together with echo or prompt_logprobs",
            )
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

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the prompt's tokens are told of as the completion's are."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt, as text or as token ids."""
        return each_prompt(self.prompt)

    def sampling_params(self) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest naming the field that is out of range."""
        wanted = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        chooses = self.candidates > (self.n or 1)  # by log probability
        params = self.sampling(max_tokens=wanted, logprobs=0 if chooses and self.logprobs is None else self.logprobs)
        if not self.echoes_logprobs:
            return params
        return replace(params, prompt_logprobs=max(params.logprobs or 0, params.prompt_logprobs or 0))


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that goes before its completions. tokens: its tokens' texts, where they are told of; offsets: how many
    characters come before each."""

    text: str = ""
    tokens: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()


def logprobs_object(chunk: GenerationChunk, echo: Echo, offset: int, top: int) -> dict[str, list[Any]]:
    """OpenAI's legacy ``logprobs``: parallel lists, with the prompt's tokens where the chunk tells of them.

    offset: characters of the text before the chunk's own tokens. top: of how many likeliest ones. The chosen one is
    always among them, so there may be one more than was asked for.
    """
    texts = [token.text for token in chunk.logprobs]
    offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
    told: list[TokenLogprob | None] = list(chunk.logprobs)
    if chunk.prompt_logprobs and echo.tokens:
        texts, offsets, told = [*echo.tokens, *texts], [*echo.offsets, *offsets], [*chunk.prompt_logprobs, *told]
    return {
        "tokens": texts,
        "token_logprobs": [None if token is None else token.logprob for token in told],
        "top_logprobs": [
            None if token is None else {text: value for _, value, text in token.top[:top]} | {token.text: token.logprob}
            for token in told
        ],
        "text_offset": offsets,
    }


def choice(
    index: int,
    text: str,
    finish_reason: str | None,
    stop_reason: str | int | None,
    logprobs: dict[str, list[Any]] | None,
    prompt_logprobs: list[dict[str, Any] | None] | None = None,
) -> dict[str, Any]:
    """One entry of ``choices``, the same in a stream and in a whole answer."""
    made = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
    return made if prompt_logprobs is None else {**made, "prompt_logprobs": prompt_logprobs}


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

"""The shapes of LoRAX's answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from deployments.api.openapi import event_stream

_ERRORS = {
    401: "no valid API key",
    403: "this API key may not do that",
    422: "validation: a field is wrong or not supported",
    424: "generation: the adapter is not there or cannot be applied, or the model failed",
    429: "overloaded: try again",
    500: "incomplete_generation: a failure of the server",
}


class LoraxError(BaseModel):
    """Every error, also as the last event of a stream that had begun."""

    error: str
    error_type: str


class PrefillToken(BaseModel):
    """A token of the prompt; nothing goes before the first one."""

    id: int
    text: str
    logprob: float | None


class AlternativeToken(BaseModel):
    """One of the likeliest in a token's place."""

    id: int
    text: str
    logprob: float


class LoraxToken(BaseModel):
    """A generated token; the text of one that is special is not part of the whole."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class BestOfSequence(BaseModel):
    """A completion that was not the likeliest."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[LoraxToken]


class Details(BaseModel):
    """seed: None where nothing was drawn."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[LoraxToken]
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateAnswer(BaseModel):
    """A whole answer."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    """Of the last event."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class StreamedToken(BaseModel):
    """One event of a stream; the last one has the whole text."""

    token: LoraxToken
    generated_text: str | None
    details: StreamDetails | None


class Info(BaseModel):
    """LoRAX's fields; null where there is no such thing here."""

    model_id: str
    model_sha: str | None
    model_dtype: str | None
    model_device_type: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int | None
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float | None
    max_batch_total_tokens: int | None
    max_waiting_tokens: int | None
    validation_workers: int
    eager_prefill: bool | None
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None


def answers(whole: Any, streamed: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route. whole: what it answers with, if it does; streamed: an event's data."""
    good: dict[str, Any] = {} if whole is None else {"model": whole}
    if streamed is not None:
        good["content"] = event_stream(streamed, LoraxError)
        good["description"] = f"Events with {streamed.__name__} as their data" + (
            " where stream is true." if whole else "."
        )
    return {200: good, **{status: {"model": LoraxError, "description": told} for status, told in _ERRORS.items()}}

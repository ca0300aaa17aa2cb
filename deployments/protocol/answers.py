"""The shapes of answers, for the OpenAPI document. What is sent is made as plain dicts: nothing is validated twice."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetails(_Shape):
    """message: for people. type, code: for programs. param: the field that is wrong, as ``messages[0].content``."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorAnswer(_Shape):
    """Every error, also as an event of a stream that had begun."""

    error: ErrorDetails


class Health(_Shape):
    """This gateway takes requests."""

    status: Literal["ok"]


class ModelObject(_Shape):
    """A model that requests may name. root: what its weights are. parent: an adapter's base model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(_Shape):
    """Every model."""

    object: Literal["list"]
    data: list[ModelObject]


class Usage(BaseModel):
    """Tokens, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Shape):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Shape):
    """Of one token in one place of the prompt. rank: 1 for the likeliest, null beyond those that were asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


class CompletionChoice(BaseModel):
    """stop_reason: the stop string or token that ended it, null for the end of sequence or the limit. prompt_logprobs:
    where asked for, of each token of the prompt by token id; null for the first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionAnswer(_Shape):
    """A whole answer; each event of a stream has this shape too."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class LikelyToken(_Shape):
    """bytes: of the token, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(LikelyToken):
    """A token of the answer."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Shape):
    """One entry a token."""

    content: list[ChatToken]
    refusal: None


class AnsweredFunction(_Shape):
    """arguments: JSON as the model wrote it."""

    name: str
    arguments: str


class AnsweredCall(_Shape):
    """A call that the client is to make."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(_Shape):
    """content: null where there are calls alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] | None = None


class ChatChoice(_Shape):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"] | None
    stop_reason: str | int | None


class ChatAnswer(_Shape):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class DeltaChoice(BaseModel):
    """A piece of one answer; delta holds role, content or tool_calls."""

    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"] | None


class ChatEvent(_Shape):
    """One event of a stream. The last one has no choices, and usage, where stream_options.include_usage asks for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[DeltaChoice]
    usage: Usage | None = None


class Embedding(_Shape):
    """Of one input. embedding: as text where base64 was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Shape):
    """Tokens, over all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(_Shape):
    """One embedding for each input, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(_Shape):
    """What a prompt is to the model. token_strs: where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokensText(_Shape):
    """The text of tokens."""

    prompt: str

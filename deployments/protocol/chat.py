"""``POST /v1/chat/completions``: what comes in and what goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.common import _UNSUPPORTED, GenerationBody
from deployments.protocol.errors import invalid
from engine.request import SamplingParams, TokenLogprob


def _content(value: Any) -> Any:
    """Text, or a list of text parts joined by newlines (what text models' templates expect)."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", 'holds a part that is not {"type": "text", "text": "..."}')
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One message. Fields beyond these reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content)] = None


class ChatBody(GenerationBody):
    """The request body."""

    unsupported_fields = {  # noqa: RUF012
        **_UNSUPPORTED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's own chat template.")
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs is only allowed together with logprobs=true")
        return self

    @property
    def max_tokens_field(self) -> str:
        """What the client calls the completion's limit."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def template_arguments(self) -> dict[str, Any]:
        """What ``Tokenizer.encode_chat`` takes beside the messages."""
        taken = {"self", "messages", "tools", "documents"}
        extra = {name: value for name, value in (self.chat_template_kwargs or {}).items() if name not in taken}
        own = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }
        return {**own, **extra}

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as the chat template reads them. OpenAI's newer "developer" is what templates call "system"."""
        plain = [message.model_dump(exclude_unset=True) for message in self.messages]
        return [{**message, "role": "system"} if message["role"] == "developer" else message for message in plain]

    def sampling_params(self) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest naming the field that is out of range."""
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            name = "max_completion_tokens"
            raise invalid(name, f"{name} is {self.max_completion_tokens} but must be 1 or more")
        if not self.logprobs:
            return self.sampling(max_tokens=wanted, logprobs=None)
        top = self.top_logprobs or 0
        if not 0 <= top <= 20:
            raise invalid("top_logprobs", f"top_logprobs is {top} but must be between 0 and 20")
        return self.sampling(max_tokens=wanted, logprobs=top)


def logprobs_object(tokens: Sequence[TokenLogprob], token_bytes: Callable[[int], bytes | None]) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a chat choice.

    token_bytes: the bytes of a token id, which text cannot say of a part of a character; ``bytes`` is null for None.
    """

    def entry(token_id: int, logprob: float, text: str) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}

    content = [
        {**entry(token.token_id, token.logprob, token.text), "top_logprobs": [entry(*likely) for likely in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def message_choice(
    index: int,
    content: str,
    finish_reason: str | None,
    stop_reason: str | int | None,
    logprobs: dict[str, Any] | None,
) -> dict[str, Any]:
    """One entry of ``choices`` of a whole answer."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }


def delta_choice(
    index: int,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One entry of ``choices`` of a stream event."""
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return choice if finish_reason is None else {**choice, "stop_reason": stop_reason}


def envelope(
    request_id: str, created: int, model: str, choices: list[dict[str, Any]], *, streamed: bool
) -> dict[str, Any]:
    """The answer round ``choices``."""
    kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {"id": request_id, "object": kind, "created": created, "model": model, "choices": choices}

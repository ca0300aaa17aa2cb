"""``POST /v1/chat/completions``: what comes in and what goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.bounds import check_levels, schema_text
from deployments.protocol.common import _UNSUPPORTED, GenerationBody
from deployments.protocol.errors import invalid
from deployments.protocol.structured import WantedGrammar
from deployments.protocol.tools import (
    MOST_CALLS,
    MOST_TOOLS,
    FunctionDefinition,
    NamedToolChoice,
    Tool,
    ToolCall,
    ToolChoice,
    arguments_schema,
    calls_schema,
    template_call,
)
from engine.request import Grammar, SamplingParams, TokenLogprob


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


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Fields beyond these reach the chat template as they are."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "if": {"properties": {"role": {"const": "tool"}}},
            "then": {"required": ["tool_call_id"], "properties": {"tool_call_id": {"type": "string"}}},
        },
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None)] = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_CALLS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_answer(self) -> ChatMessage:
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool", "a message of role tool needs the tool_call_id of the call it answers")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates read it. Raises ValueError for a call whose arguments are no JSON object."""
        plain = self.model_dump(exclude_unset=True)
        if plain["role"] == "developer":  # OpenAI's newer word
            plain["role"] = "system"
        if plain.get("tool_calls"):
            plain["tool_calls"] = [template_call(call) for call in plain["tool_calls"]]
        return plain


class ChatBody(GenerationBody):
    """The request body."""

    unsupported_fields = {  # noqa: RUF012
        **_UNSUPPORTED,
        "chat_template": (),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: ToolChoice = Field(None, description="auto when left out; see gateway.tool_format.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    max_completion_tokens: int | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's own chat template.")
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="before")
    @classmethod
    def _check_depth(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("messages", "chat_template_kwargs", "tools"):
                check_levels(data.get(name), name)
        return data

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs is only allowed together with logprobs=true")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatBody:
        names = [function.name for function in self.functions()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise invalid("tools", f"tools holds {twice!r} twice: give each function a name of its own")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise invalid("tool_choice", f"tool_choice names {self.tool_choice.function.name!r}, which tools has not")
        if self.tool_choice == "required" and not names:
            raise invalid("tool_choice", "tool_choice is only allowed together with tools")
        return self

    def functions(self) -> list[FunctionDefinition]:
        """What the model may call."""
        return [tool.function for tool in self.tools or ()]

    @property
    def named_function(self) -> FunctionDefinition | None:
        """The one that it must call, if tool_choice names one."""
        if not isinstance(self.tool_choice, NamedToolChoice):
            return None
        name = self.tool_choice.function.name
        return next(function for function in self.functions() if function.name == name)

    @property
    def calls_tools(self) -> bool:
        """Whether an answer may hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    def wanted(self) -> WantedGrammar | None:
        """See ``GenerationBody``. A function that must be called leaves no content for response_format."""
        if (named := self.named_function) is not None:
            schema = arguments_schema(named)
        elif self.tool_choice == "required":
            schema = calls_schema(self.functions(), parallel=self.parallel_tool_calls is not False)
        else:
            return super().wanted()
        if (other := super().wanted()) is not None and other.param != "response_format":
            raise invalid(other.param, f"tool_choice and {other.param} both say what the output must be: send one")
        return WantedGrammar("tools", Grammar("json_schema", schema_text(schema)))

    @property
    def max_tokens_field(self) -> str:
        """What the client calls the completion's limit."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def template_arguments(self) -> dict[str, Any]:
        """What ``Tokenizer.encode_chat`` takes beside the messages."""
        taken = {"self", "messages", "tools", "documents"}
        extra = {name: value for name, value in (self.chat_template_kwargs or {}).items() if name not in taken}
        own: dict[str, Any] = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }
        if self.calls_tools:
            own["tools"] = [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]
        return {**own, **extra}

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as the chat template reads them. Raises ApiError naming a call with arguments that are none."""
        plain = []
        for index, message in enumerate(self.messages):
            try:
                plain.append(message.plain())
            except (ValueError, RecursionError):
                param = f"messages[{index}].tool_calls"
                raise invalid(param, f"{param}: function.arguments must be a JSON object, as text") from None
        return plain

    def sampling_params(self) -> SamplingParams:
        """The engine's parameters. Raises InvalidRequest naming the field that is out of range."""
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if wanted is not None and wanted < 1:
            name = self.max_tokens_field
            raise invalid(name, f"{name} is {wanted} but must be 1 or more")
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
    content: str | None,
    finish_reason: str | None,
    stop_reason: str | int | None,
    logprobs: dict[str, Any] | None,
    tool_calls: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One entry of ``choices`` of a whole answer."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {
        "index": index,
        "message": {**message, "tool_calls": tool_calls} if tool_calls else message,
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
    request_id: str, created: int, model: str, fingerprint: str, choices: list[dict[str, Any]], *, streamed: bool
) -> dict[str, Any]:
    """The answer round ``choices``."""
    kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {
        "id": request_id,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": choices,
    }

"""vLLM's ``POST /tokenize`` and ``POST /detokenize``: what comes in and what goes out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.protocol.bounds import check_levels
from deployments.protocol.chat import ChatBody, ChatMessage
from deployments.protocol.errors import invalid, unsupported
from deployments.protocol.tools import MOST_TOOLS, Tool

_MODEL = Field(None, max_length=1024, description="The base model's name (default) or an adapter's.")


def _one_of_both(schema: dict[str, Any]) -> None:
    """For the OpenAPI document alone."""
    text, chat = {"prompt": {"type": "string"}}, {"messages": {"type": "array"}}
    none = {"prompt": {"type": "null"}}, {"messages": {"type": "null"}}
    schema["anyOf"] = [
        {"required": ["prompt"], "properties": text | none[1]},
        {"required": ["messages"], "properties": chat | none[0] | {"add_special_tokens": {"enum": [False, None]}}},
    ]


class TokenizeBody(BaseModel):
    """A text (``prompt``), or a chat as ``/v1/chat/completions`` takes it (``messages``)."""

    model_config = ConfigDict(strict=True, extra="ignore", json_schema_extra=_one_of_both)

    model: str | None = _MODEL
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    add_special_tokens: bool | None = Field(None, description="For prompt: true when left out.")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the model's own chat template.")
    return_token_strs: bool | None = Field(None, description="Also the tokens as the vocabulary spells them.")

    @model_validator(mode="before")
    @classmethod
    def _check_before(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("messages", "chat_template_kwargs", "tools"):
                check_levels(data.get(name), name)
            if data.get("chat_template") is not None:
                raise unsupported("chat_template", "chat_template is the model's own on this server: leave it out")
        return data

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "send either prompt, a text, or messages, a chat")
        if self.messages is not None and self.add_special_tokens:
            raise unsupported("add_special_tokens", "the chat template writes special tokens itself: leave it out")
        return self

    def chat(self, base_model: str) -> ChatBody:
        """The chat, as if its answer were asked for."""
        values = {
            "model": self.model or base_model,
            "messages": self.messages,
            "tools": self.tools,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return ChatBody.model_validate(values)


class DetokenizeBody(BaseModel):
    """Token ids of a model."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = _MODEL
    tokens: list[Annotated[int, Field(ge=0)]]


def tokenized(tokens: list[int], max_model_len: int, spelled: list[str] | None) -> dict[str, Any]:
    """vLLM's answer. spelled: for ``return_token_strs``."""
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": spelled}

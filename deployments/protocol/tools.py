"""Functions that a model may call: ``tools``, ``tool_choice``, and the calls in an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from deployments.protocol.bounds import check_levels, schema_text
from deployments.protocol.structured import NAME

MOST_TOOLS = 128  # as OpenAI has it
MOST_CALLS = 128  # in one message


def _parameters(value: Any) -> Any:
    if isinstance(value, dict):
        check_levels(value, "the schema")
        schema_text(value)
    return value


class FunctionDefinition(BaseModel):
    """One function. parameters: the JSON schema of its arguments, none where there are none."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, BeforeValidator(_parameters)] = None
    strict: bool | None = None


class Tool(BaseModel):
    """An entry of ``tools``."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    """Which one."""

    name: str


class NamedToolChoice(BaseModel):
    """``tool_choice`` that names a function."""

    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required") or isinstance(value, NamedToolChoice):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return NamedToolChoice(type="function", function=NamedFunction(name=function["name"]))
    raise PydanticCustomError(
        "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
    )


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice | None,
    BeforeValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedToolChoice | None),
]


class CalledFunction(BaseModel):
    """What was called. arguments: JSON, as the model wrote it."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in a message of the assistant."""

    model_config = ConfigDict(strict=True, extra="allow")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def template_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates read it: with its arguments as an object.

    Raises ValueError for arguments that are none.
    """
    text = call["function"]["arguments"]
    arguments = json.loads(text) if text.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError("not an object")
    return {**call, "function": {**call["function"], "arguments": arguments}}


def arguments_schema(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a function's arguments."""
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def calls_schema(functions: Sequence[FunctionDefinition], *, parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls, one or more, of these functions.

    Each function's schema becomes a definition, and references within it are moved with it.
    """
    definitions = {
        str(index): _moved(arguments_schema(function), f"#/$defs/{index}") for index, function in enumerate(functions)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/{index}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, "$defs": definitions}


def _moved(schema: Any, to: str) -> Any:
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: to + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, to)
        for key, value in schema.items()
    }


def call_object(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """One entry of a message's ``tool_calls``."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def begun_call(index: int, call_id: str, name: str) -> dict[str, Any]:
    """The first delta of a call."""
    return {"tool_calls": [{"index": index, **call_object(call_id, name, "")}]}


def call_arguments(index: int, arguments: str) -> dict[str, Any]:
    """A later delta of a call."""
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}

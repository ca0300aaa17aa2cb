"""OpenAI's four ways to write one or several texts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError


def _prompt(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or _is_ids(value):
            return value
        if all(isinstance(item, list) and item and _is_ids(item) for item in value):
            return value
    kinds = "a string, a list of strings, a list of token ids or a list of lists of token ids"
    raise PydanticCustomError("prompt", f"must be {kinds}, and no list may be empty")


def _is_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)


_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_Schema = str | Annotated[list[str], Field(min_length=1)] | _Ids | Annotated[list[_Ids], Field(min_length=1)]
Prompts = Annotated[
    str | list[str] | list[int] | list[list[int]], BeforeValidator(_prompt, json_schema_input_type=_Schema)
]


def each_prompt(prompts: Prompts) -> list[str | list[int]]:
    """One entry each, as text or as token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts[0], int):
        return [[item for item in prompts if isinstance(item, int)]]
    return [item for item in prompts if not isinstance(item, int)]

"""Structured output: OpenAI's ``response_format``, and vLLM's ``structured_outputs`` and ``guided_*``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from llguidance.gbnf_to_lark import gbnf_to_lark
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.protocol.bounds import MOST_SCHEMA_BYTES, check_levels, schema_text
from deployments.protocol.errors import invalid, unsupported
from engine.request import Grammar

MOST_CHOICES = 1024
_MOST_GBNF = 2**12  # it is translated in Python, on the loop of all requests
NAME = r"^[a-zA-Z0-9_-]{1,64}$"  # of schemas and functions, as OpenAI has it


def _schema(value: Any) -> Any:
    """A JSON schema as an object; vLLM also takes it as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("schema", "is text but not JSON: send the schema as an object") from None
    if value is None or isinstance(value, dict):
        check_levels(value, "the schema")
        schema_text(value)
        return value
    raise PydanticCustomError("schema", "must be a JSON schema: an object, or text that holds one")


def _lark(text: str, param: str) -> str:
    """vLLM takes GBNF, too, which only there has rules with ``::=``."""
    if "::=" not in text:
        return text
    if len(text) > _MOST_GBNF:
        raise invalid(
            param, f"{param}: the GBNF grammar has {len(text)} characters: at most {_MOST_GBNF}, or send Lark"
        )
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # it raises nothing more precise
        raise invalid(param, f"{param}: the GBNF grammar cannot be read: {str(error)[:500]}") from None


Schema = Annotated[dict[str, Any] | None, BeforeValidator(_schema, json_schema_input_type=dict[str, Any] | str | None)]
Expression = Annotated[str | None, Field(min_length=1, max_length=MOST_SCHEMA_BYTES)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(min_length=1, max_length=MOST_CHOICES)]


@dataclass(frozen=True, slots=True)
class WantedGrammar:
    """A grammar and the field of the request that asks for it."""

    param: str
    grammar: Grammar


class JsonSchemaFormat(BaseModel):
    """``response_format.json_schema``. The schema always holds, whatever ``strict`` says."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: Schema = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's ``response_format``."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise invalid("response_format.json_schema", "response_format of type json_schema needs a json_schema")
        return self

    def grammars(self) -> Iterator[WantedGrammar]:
        """None or one."""
        if self.type == "json_object":
            yield WantedGrammar("response_format", Grammar("json_object"))
        elif self.json_schema is not None and self.type == "json_schema":
            schema = self.json_schema.schema_
            grammar = Grammar("json_object") if schema is None else Grammar("json_schema", schema_text(schema))
            yield WantedGrammar("response_format", grammar)


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``. grammar: Lark as llguidance reads it, or GBNF."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    json_: Schema = Field(None, alias="json")
    regex: Expression = None
    choice: Choices = None
    grammar: Expression = None
    json_object: bool | None = None
    structural_tag: Any = None

    @model_validator(mode="after")
    def _refuse_tags(self) -> StructuredOutputs:
        if self.structural_tag is not None:
            raise unsupported("structured_outputs.structural_tag", "structural tags are not supported: use a grammar")
        return self

    def grammars(self) -> Iterator[WantedGrammar]:
        """One for each field that is set."""
        if self.json_object:
            yield WantedGrammar("structured_outputs.json_object", Grammar("json_object"))
        yield from _grammars("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)


def _grammars(
    prefix: str, schema: dict[str, Any] | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[WantedGrammar]:
    """One for each that is not None. prefix: what goes before its name in the request."""
    if schema is not None:
        yield WantedGrammar(f"{prefix}json", Grammar("json_schema", schema_text(schema)))
    if regex is not None:
        yield WantedGrammar(f"{prefix}regex", Grammar("regex", regex))
    if choice is not None:
        yield WantedGrammar(f"{prefix}choice", Grammar("choice", json.dumps(choice)))
    if grammar is not None:
        yield WantedGrammar(f"{prefix}grammar", Grammar("lark", _lark(grammar, f"{prefix}grammar")))


class StructuredFields(BaseModel):
    """The fields of a request; at most one of them may ask for anything."""

    response_format: ResponseFormat | None = Field(None, description="text, json_object, or json_schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="One of json, regex, choice, grammar.")
    guided_json: Schema = Field(None, description="vLLM's older structured_outputs.json.")
    guided_regex: Expression = None
    guided_choice: Choices = None
    guided_grammar: Expression = None

    def wanted_grammar(self) -> WantedGrammar | None:
        """What the completion must be. Raises ApiError where several fields say it."""
        wanted = [
            *(self.response_format.grammars() if self.response_format else ()),
            *(self.structured_outputs.grammars() if self.structured_outputs else ()),
            *_grammars("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        ]
        if len(wanted) > 1:
            names = " and ".join(one.param for one in wanted)
            raise invalid(wanted[1].param, f"{names} each say what the output must be: send one of them")
        return wanted[0] if wanted else None

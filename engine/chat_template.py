"""Chat templates as Hugging Face repositories ship them: Jinja in a sandbox, with the extras templates rely on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapter_store.template_files import TEMPLATE_FILE, named_templates
from engine.request import InvalidRequest

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_MARK "
# Names that templates read a message's reasoning under; the first is the usual one.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
# What a template may raise on messages of a shape that it does not expect.
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class BadTemplate(ValueError):
    """A template that is wrong whatever the messages. The text goes on from "its chat template"."""


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks what to train on; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """One or several named templates of a model, rendered to the text that transformers would render."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], model: str) -> None:
        """sources: template name -> Jinja text. special_tokens: ``bos_token`` and so on, visible to the templates."""
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._model = model
        self._compiled: dict[str, Template] = {}

    @classmethod
    def from_dir(
        cls, folder: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str], model: str
    ) -> ChatTemplate:
        """``chat_template.jinja`` and ``additional_chat_templates/*.jinja``, else the configuration's templates."""
        sources: dict[str, str] = {}
        if (main := folder / TEMPLATE_FILE).is_file():
            sources["default"] = main.read_text(encoding="utf-8")
        for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[extra.stem] = extra.read_text(encoding="utf-8")
        if not sources:
            sources = dict(named_templates(config.get("chat_template")))
        return cls(sources, special_tokens, model)

    @property
    def text(self) -> str:
        """All templates, for who looks for what they teach the model."""
        return "\n".join(self.sources.values())

    def compile(self) -> None:
        """Compile all of them. Raises BadTemplate."""
        for name, source in self.sources.items():
            try:
                self._compiled[name] = _environment().from_string(source)
            except TemplateSyntaxError as error:
                raise BadTemplate(f"does not compile: line {error.lineno}: {error.message}") from error
            except (*_RENDER_ERRORS, SyntaxError, MemoryError) as error:  # of Python's compiler, or of constants
                raise BadTemplate(f"does not compile: {type(error).__name__}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> str:
        """The prompt text. ``extra`` is what the model's own template knows, such as ``enable_thinking``.

        continue_final_message: leave the last message open for the model to go on with it.
        Raises InvalidRequest (param "messages") without messages or a template, and for whatever the template refuses.
        """
        if not messages:
            raise InvalidRequest("messages is empty: send at least one message", "messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt are both true: choose one", "continue_final_message"
            )
        # Clients send "content": null and the like; templates expect the key to be absent then.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        chat = [_name_reasoning(message) for message in chat]
        if continue_final_message:
            chat[-1] = _mark_end(chat[-1])
        try:
            text = self._choose(tools is not None).render(
                {**self._special_tokens, **extra},
                messages=chat,
                tools=None if tools is None else list(tools),
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"the chat template of {self._model} refused the messages: {type(error).__name__}: {error}", "messages"
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def _choose(self, has_tools: bool) -> Template:
        name = "tool_use" if has_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            others = f"; it has {', '.join(sorted(self.sources))} but no default" if self.sources else ""
            raise InvalidRequest(
                f"model {self._model} has no chat template{others}: use /v1/completions, or put a "
                "chat_template.jinja into the model's folder",
                "messages",
            )
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self.sources[name])
        return self._compiled[name]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and non-ASCII characters, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as the models' own examples use it


def _name_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_MARK}
    if isinstance(content, list):
        for index in reversed(range(len(content))):
            if isinstance(content[index], Mapping) and isinstance(content[index].get("text"), str):
                marked = {**content[index], "text": content[index]["text"] + _CONTINUE_MARK}
                return {**message, "content": [*content[:index], marked, *content[index + 1 :]]}
    raise InvalidRequest("continue_final_message is true but the last message has no text to continue", "messages")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_CONTINUE_MARK.strip())
    if position < 0:
        raise InvalidRequest(
            "continue_final_message is true but the chat template drops the last message's text", "messages"
        )
    # A template that trims the message took the mark's own space with it, so it would have trimmed the text's too.
    kept_spaces = text.startswith(_CONTINUE_MARK, position)
    return text[:position] if kept_spaces else text[:position].rstrip()

"""How models write down the functions they call: the formats that many models share, one line each."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

ToolFormatName = Literal["hermes", "llama3", "mistral", "none"]

_CALL_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A block of calls, each ``{"name": ..., "arguments": {...}}`` (or ``parameters``), one or a JSON list of them.

    opens: what begins a block; empty where nothing does. closes: what ends it, if anything. bare: a text that begins
    with this character is a block without ``opens``, which is a special token that decoding leaves out or that the
    model does without. call_id_length: characters of a call's id after its prefix, as the chat template wants them.
    """

    opens: str
    closes: str = ""
    bare: str = ""
    call_id_prefix: str = "call_"
    call_id_length: int = 24

    def markup(self) -> Iterable[str]:
        """What is never a part of an answer's content."""
        return (marker for marker in (self.opens, self.closes) if marker)

    def new_call_id(self) -> str:
        """The id of one call."""
        random = (secrets.choice(_CALL_ID_CHARACTERS) for _ in range(self.call_id_length))
        return self.call_id_prefix + "".join(random)


# What tool_choice "required" makes of any model: a JSON list and nothing else.
LIST = ToolFormat(opens="", bare="[")
FORMATS: dict[str, ToolFormat] = {
    "hermes": ToolFormat("<tool_call>", "</tool_call>"),  # Hermes 2 Pro; Qwen2.5, Qwen3
    "llama3": ToolFormat("<|python_tag|>", bare="{"),  # Llama 3.1's and later JSON calls
    # Mistral's templates refuse ids of any other form than nine letters and digits.
    "mistral": ToolFormat("[TOOL_CALLS]", bare="[", call_id_prefix="", call_id_length=9),
}
# What only the chat template of such a model says.
_SIGNS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3": '{"name": function name, "parameters":'}


def tool_format(name: str | None, chat_template: str) -> ToolFormat | None:
    """The format of this name, or for None the one that the chat template teaches; None where there is none."""
    if name is None:
        name = next((found for found, sign in _SIGNS.items() if sign in chat_template), "none")
    assert name in get_args(ToolFormatName)
    return FORMATS.get(name)

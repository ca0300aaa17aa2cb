"""One function call as JSON, read while it comes."""

from __future__ import annotations

import json
import string
from collections.abc import Collection
from typing import Literal

_SPACE = " \t\n\r"
_SCALAR = "-+.0123456789" + string.ascii_letters
_Awaits = Literal["key or end", "key", "colon", "value", "comma or end"]


class CallObject:
    """``{"name": "f", "arguments": {...}}`` a character at a time, members in any order, others ignored.

    ``parameters`` is another word for arguments, and arguments that are a string hold the JSON. name: None until it and
    the beginning of the arguments, or the end, are there; from then on the call stands. ended: nothing more belongs to
    it. Arguments are JSON as the model wrote it: brackets and strings are counted, nothing else is looked at.
    """

    def __init__(self, names: Collection[str]) -> None:
        """names: functions that there are; the object of any other is no call."""
        self._names = names
        self._awaits: _Awaits = "key or end"
        self._begun = False
        self._key = ""
        self._text: list[str] = []  # of the member being read, or the scalar that is not told from its first character
        self._depth = 0
        self._in_string = self._escaped = False
        self._has_arguments = False
        self._kept: list[str] = []  # arguments not taken yet
        self._wanted: str | None = None
        self.name: str | None = None
        self.ended = False

    def push(self, character: str) -> bool:
        """False when this character makes it no call of a function that there is, or follows one."""
        if self.ended:
            return False
        if self._in_string or self._depth:
            return self._inside(character)
        if self._awaits == "value" and self._text:  # a number, true, false or null goes on
            if character in ",}" + _SPACE:
                return self._member() and self.push(character)
            self._text.append(character)
            return character in _SCALAR
        return character in _SPACE or self._between(character)

    def take_arguments(self) -> str:
        """What came of the arguments since the last time; nothing before there is a ``name``."""
        if self.name is None:
            return ""
        taken = "".join(self._kept)
        self._kept.clear()
        return taken

    def _between(self, character: str) -> bool:
        """Outside of any string, list, object or number."""
        if not self._begun:
            self._begun = True
            return character == "{"
        match self._awaits, character:
            case (("key or end" | "key"), '"'):
                self._open(character)
            case "colon", ":":
                self._awaits = "value"
            case "value", _:
                return self._begin_value(character)
            case "comma or end", ",":
                self._awaits = "key"
            case (("key or end" | "comma or end"), "}"):
                return self._end()
            case _:
                return False
        return True

    def _begin_value(self, character: str) -> bool:
        if character in '{["':
            if self._key == "arguments" and character == "{":
                self._settle()
            self._open(character)
            return not (self._key == "name" and character != '"') and not (
                self._key == "arguments" and character == "["
            )
        self._text.append(character)
        return character in _SCALAR and self._key not in ("name", "arguments")

    def _open(self, character: str) -> None:
        self._in_string = character == '"'
        self._depth = 0 if self._in_string else 1
        self._add(character)

    def _inside(self, character: str) -> bool:
        self._add(character)
        if self._in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
                return True
            if character != '"':
                return True
            self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return bool(self._depth or self._in_string) or self._member()

    def _add(self, character: str) -> None:
        # An object of arguments goes out as it comes; everything else is looked at when it is whole.
        streams = self._key == "arguments" and self._depth > 0 and not self._text
        (self._kept if streams else self._text).append(character)

    def _member(self) -> bool:
        """A key or a value is whole."""
        text = "".join(self._text)
        self._text.clear()
        if self._awaits != "value":
            key = _string(text)
            self._key = {"parameters": "arguments"}.get(key or "", key or "")
            if self._key == ("arguments" if self._has_arguments else "name" if self._wanted else None):
                self._key = ""  # said before: what was first stands
            self._awaits = "colon"
            return key is not None
        key, self._key = self._key, ""
        self._awaits = "comma or end"
        if key == "name":
            self._wanted = _string(text)
            if self._has_arguments:
                self.name = self._wanted
            return self._wanted in self._names
        if key == "arguments" and text:  # they were a string
            arguments = _string(text)
            if arguments is None:
                return False
            self._settle()
            self._kept.append(arguments)
        return True

    def _settle(self) -> None:
        self._has_arguments = True
        self.name = self._wanted

    def _end(self) -> bool:
        self.ended = True
        if not self._has_arguments:
            self._settle()
            self._kept.append("{}")
        return self.name is not None


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None

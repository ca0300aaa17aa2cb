"""What a model says, told apart while it comes: content for people, and calls of functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from deployments.api.call_object import CallObject
from deployments.api.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one call. name: on the first piece only, which has no arguments."""

    index: int
    arguments: str = ""
    name: str | None = None


Piece = str | CallDelta


class NamedCall:
    """The same for text that is the arguments of one function and nothing else."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        """See ``ToolCallParser``."""
        begun: list[Piece] = [] if self.calls else [CallDelta(0, name=self._name)]
        self.calls = 1
        return [*begun, CallDelta(0, text)] if text else begun

    def finish(self) -> list[Piece]:
        """See ``ToolCallParser``."""
        return [] if self.calls else self.push("")


class ToolCallParser:
    """Text in pieces to content and calls. Where the pieces break changes nothing but where theirs do.

    What begins like a call and is none, or is one of a function that there is not, is content, without the markup.
    White space round a block of calls belongs to it. A call that the text ends in the midst of has what there is of its
    arguments.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form = form
        self._names = frozenset(names)
        self._in_block = False
        self._held = ""  # in a block, what came since its last call, or since it began; else what may become markup
        self._space = ""  # white space that is content unless a block follows
        self._untouched = True  # nothing but white space so far: a block may begin without markup
        self._after_block = False
        self._call: CallObject | None = None
        self._block_calls = 0
        self._calls = 0
        self._out: list[Piece] = []

    @property
    def calls(self) -> int:
        """How many there are so far."""
        return self._calls

    def push(self, text: str) -> list[Piece]:
        """What this piece of text completes, in order; neighbours of one kind are one."""
        for character in text:
            if self._call is not None:
                self._in_call(self._call, character)
            elif self._in_block:
                self._between_calls(character)
            else:
                self._in_content(character)
        return self._taken()

    def finish(self) -> list[Piece]:
        """The same for the end of the text."""
        if self._in_block:
            self._no_call()
        self._say(self._held)
        if self._space:
            self._out.append(self._space)
        return self._taken()

    def _in_content(self, character: str) -> None:
        if self._untouched and character == self._form.bare:
            self._untouched = False
            self._begin_block()
            self._between_calls(character)
            return
        self._held += character
        while self._held:
            for marker in self._form.markup():
                if self._held == marker:
                    self._held = ""
                    self._untouched = False
                    if marker == self._form.opens:
                        self._begin_block()
                    return
            if any(marker.startswith(self._held) for marker in self._form.markup()):
                return
            self._say(self._held[0])
            self._held = self._held[1:]

    def _begin_block(self) -> None:
        self._in_block, self._block_calls = True, 0

    def _between_calls(self, character: str) -> None:
        """In a block: brackets, commas and white space, and the markup that ends it."""
        closes = self._form.closes
        self._held += character
        mark = self._held.lstrip(_SEPARATORS)
        if character == "{" and mark == "{":
            self._call = CallObject(self._names)
            self._call.push(character)
        elif closes and mark == closes:
            self._end_block("")
        elif mark and not (closes and closes.startswith(mark)):
            self._end_block(self._held.lstrip(_SEPARATORS) if self._block_calls else self._held)

    def _in_call(self, call: CallObject, character: str) -> None:
        self._held += character
        told = call.name is not None
        goes_on = call.push(character)
        if call.name is not None:
            if not told:
                self._held = self._space = ""
                self._out.append(CallDelta(self._calls, name=call.name))
                self._calls += 1
                self._block_calls += 1
            if arguments := call.take_arguments():
                self._out.append(CallDelta(self._calls - 1, arguments))
            self._held = ""
            if call.ended:
                self._call = None
            elif not goes_on:
                self._call = None
                self._between_calls(character)
        elif not goes_on:
            self._held = self._held[:-1]
            self._no_call()
            self._end_block(character)

    def _no_call(self) -> None:
        """What is held is content; a reader that looked into it for calls could be kept at it for ever."""
        held, self._held = self._held, ""
        for marker in self._form.markup():
            while marker in held:
                held = held.replace(marker, "")
        self._say(held.lstrip(_SEPARATORS) if self._block_calls else held)

    def _end_block(self, rest: str) -> None:
        """``rest`` comes after the block."""
        self._held = ""
        self._in_block, self._call = False, None
        self._after_block = self._after_block or self._block_calls > 0
        for character in rest:
            self._in_content(character)

    def _say(self, text: str) -> None:
        """Content; white space only once something follows that is none."""
        for character in text:
            if character.isspace():
                if not self._after_block:
                    self._space += character
                continue
            self._untouched = self._after_block = False
            self._out.append(self._space + character)
            self._space = ""

    def _taken(self) -> list[Piece]:
        merged: list[Piece] = []
        for piece in self._out:
            match merged[-1] if merged else None, piece:
                case str(last), str():
                    merged[-1] = last + piece
                case CallDelta(name=None) as last, CallDelta(name=None) if last.index == piece.index:
                    merged[-1] = CallDelta(piece.index, last.arguments + piece.arguments)
                case _:
                    merged.append(piece)
        self._out.clear()
        return merged


_SEPARATORS = " \t\r\n[],;"

"""Tokens to text while they come: no broken characters, and stop strings found wherever the pieces break."""

from __future__ import annotations

from collections.abc import Sequence

from engine.tokenizer import Tokenizer

_BROKEN = "\ufffd"
# A character has at most four bytes, so more tokens than this without a whole one are no text. Each look decodes all
# that is held back; from here on it looks again when that has grown by this share, so that a token's cost is bounded.
_MANY_HELD = 32


class TextStream:
    """Incremental detokenizer: the pieces joined are the decoded tokens, special tokens skipped.

    A piece ends with a whole character; what may still become one is held back until it does or ``flush``.
    ``context`` is what the tokens continue (the prompt's end): decoders treat the start of a text apart.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The window is the tokens of the last piece, then those held back: a decoder needs no more to its left.
        self._window = list(context)
        self._shown = tokenizer.decode(self._window)
        self._shown_tokens = len(self._window)
        self._look_at = 0  # how many tokens must be held back for the next look

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        self._window.append(token_id)
        held = len(self._window) - self._shown_tokens
        if held < self._look_at:
            return ""
        self._look_at = held + held // _MANY_HELD
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith(_BROKEN) else self._show(text)

    def flush(self) -> str:
        """What is still held back, as it is."""
        if len(self._window) == self._shown_tokens:
            return ""
        return self._show(self._tokenizer.decode(self._window))

    def _show(self, text: str) -> str:
        shown = self._shown
        if not text.startswith(shown):
            # Some decoders change their mind about bytes already decoded; what was given out stays given out.
            same = next((i for i, (old, new) in enumerate(zip(shown, text, strict=False)) if old != new), len(text))
            shown = shown[:same]
        piece = text[len(shown) :]
        if piece:
            del self._window[: self._shown_tokens]
            self._shown = self._tokenizer.decode(self._window)
            self._shown_tokens = len(self._window)
            self._look_at = 0
        return piece


class StopStrings:
    """Finds the first stop string to be complete in a text that comes in pieces, and cuts the text before it.

    Of several that end at the same character, the one that starts first wins, so that the outcome does not depend
    on where the pieces break. Only what may still become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text that is safe to give out, the stop string found or None)."""
        if not self._stops or not piece:
            return piece, None
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What is still held back: it never became a stop string."""
        held, self._held = self._held, ""
        return held


class OutputText:
    """A request's visible text: ``TextStream`` followed by ``StopStrings``."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], context: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer, context)
        self._stops = StopStrings(stops)

    def push(self, token_id: int) -> tuple[str, str | None]:
        """(new text, the stop string that ended it or None)."""
        return self._stops.push(self._stream.push(token_id))

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text when no more tokens come; bytes still held back may complete a stop string."""
        text, stop = self._stops.push(self._stream.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

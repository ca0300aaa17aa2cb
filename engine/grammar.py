"""What a whole completion must be: grammars compiled with llguidance, and the tokens that they allow next.

Compiling is for any thread but the step loop's, which only takes tokens in and has the masks made by others. What a
grammar may take is bounded in text, in work to compile it and in work a step.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.request import Grammar, InvalidRequest
from engine.tokenizer import Tokenizer

_MOST_CHARS = 1 << 16
_MOST_KEPT = 128  # compiled grammars
# In llguidance's units of work. A row's mask takes tens of µs as a rule and 10 ms at the worst, a grammar up to 50 MB.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=25_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Endless blanks are valid JSON, and what models fall into: between two tokens of it there may be two, or two line
# breaks and an indentation.
_JSON: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t]{1,2}|(\r?\n){1,2}[ \t]{0,16}"}


def check_grammar(grammar: Grammar, param: str = "grammar") -> None:
    """Refuse a grammar that is none or takes too much, in a few ms, without a tokenizer.

    param: what the client calls it. Raises InvalidRequest with the reason.
    """
    refused, reasons = LLMatcher.validate_grammar_with_warnings(_source(grammar, param), limits=_LIMITS)
    if refused:
        raise _refused(grammar, reasons[0], param)


class GrammarState:
    """How far one completion has come in its grammar.

    mask: (words,) int32, bit ``t % 32`` of word ``t // 32`` is set where token t may come next. ready: the mask is of
    the latest token. ended: nothing but the end of the sequence may follow. error: why it cannot be followed any
    further, else None.
    """

    def __init__(self, matcher: LLMatcher, mask: np.ndarray) -> None:
        self.matcher, self.mask = matcher, mask
        self.ready, self.ended = True, False
        self.error: str | None = None

    def advance(self, token: int) -> None:
        """Take the token in. Only while it is ready."""
        assert self.ready
        self.ready = False
        self.matcher.consume_token(token)
        self._look()

    def look_ahead(self, mask: np.ndarray) -> None:
        """Fill ``mask``, (words,) int32 of llguidance's own width, and be ready with it. Gives the GIL back."""
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.mask = mask
        self._look()
        self.ready = True

    def _look(self) -> None:
        if self.matcher.is_error():
            self.error = self.matcher.get_error()
        self.ended = self.matcher.is_stopped()


class Grammars:
    """Compiles grammars for one tokenizer, keeps the latest, and finds out which tokens they allow. Thread-safe; each
    state is one thread's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: width of the logits. Takes a second or more for a large vocabulary, with the GIL held."""
        width = max(vocab_size, tokenizer.vocab_size)
        self._words = -(-width // 32)
        self._tokenizer: LLTokenizer | None = None
        self._useless = "this model names no end-of-sequence token, which a grammar needs"
        if eos_token_ids:
            try:
                self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=width, eos_token=sorted(eos_token_ids))
            except ValueError as error:
                self._useless = f"{tokenizer.name} has a tokenizer that grammars cannot be followed with: {error}"
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, GrammarState] = OrderedDict()
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "engine-masks")

    def start(self, grammar: Grammar, param: str = "grammar") -> GrammarState:
        """The state before the first token. Takes as long as compiling takes, with the GIL given back.

        Raises InvalidRequest for what is no grammar, takes too much, or cannot begin.
        """
        if self._tokenizer is None:
            raise InvalidRequest(self._useless, param)
        with self._lock:
            first = self._kept.get(grammar)
            if first is not None:
                self._kept.move_to_end(grammar)
                return GrammarState(first.matcher.deep_copy(), first.mask)
        matcher = LLMatcher(self._tokenizer, _source(grammar, param), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error(), param)
        first = GrammarState(matcher, self._mask())
        first.look_ahead(first.mask)
        if first.error is not None:
            raise _refused(grammar, first.error, param)
        if first.ended or not first.mask.any():
            raise _refused(grammar, "it allows no text", param)
        with self._lock:
            self._kept[grammar] = first
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return GrammarState(matcher.deep_copy(), first.mask)

    def look_ahead(self, states: Sequence[GrammarState], patience_s: float | None = None) -> list[Future[None]]:
        """Have the states get ready, in a few threads. Waits for all of them, but no longer than ``patience_s``."""
        futures = [self._threads.submit(state.look_ahead, self._mask()) for state in states]
        wait(futures, patience_s)
        return futures

    def close(self) -> None:
        """End the threads once they are done."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _mask(self) -> np.ndarray:
        return np.zeros(self._words, np.int32)


def _source(grammar: Grammar, param: str) -> str:
    """The grammar as llguidance reads it."""
    if len(grammar.text) > _MOST_CHARS:
        raise _refused(grammar, f"it has {len(grammar.text)} characters; at most {_MOST_CHARS} are taken", param)
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_read_json(grammar, dict, param), overrides=_JSON)
        case "choice":
            choices = _read_json(grammar, list, param)
            if not choices or not all(isinstance(choice, str) for choice in choices):
                raise _refused(grammar, "it must be a list of one string or more", param)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _read_json(grammar: Grammar, kind: type, param: str) -> Any:
    try:
        value = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise _refused(grammar, f"it is not valid JSON: {error}", param) from error
    if not isinstance(value, kind):
        raise _refused(grammar, f"it is a JSON {type(value).__name__}, not {kind.__name__}", param)
    return value


def _refused(grammar: Grammar, reason: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"the {grammar.kind} grammar cannot be used: {reason.strip()[:500]}", param)

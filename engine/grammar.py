"""What a whole completion must be: grammars compiled with llguidance, and the tokens that they allow next.

Compiling is for any thread but the step loop's, which only follows: one token a row and step, then all rows' masks
together. What a grammar may take is bounded in text, in work to compile it and in work a step.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

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
# Endless blanks are valid JSON, and what models fall into: so many are allowed in a row as deep indentation needs.
_JSON: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\r\t]{1,40}"}


def check_grammar(grammar: Grammar, param: str = "grammar") -> None:
    """Refuse a grammar that is none or takes too much, in a few ms, without a tokenizer.

    param: what the client calls it. Raises InvalidRequest with the reason.
    """
    refused, reasons = LLMatcher.validate_grammar_with_warnings(_source(grammar, param), limits=_LIMITS)
    if refused:
        raise _refused(grammar, reasons[0], param)


class GrammarState:
    """How far one completion has come in its grammar.

    mask: (words,) int32, bit ``t % 32`` of word ``t // 32`` is set where token t may come next. ended: nothing but the
    end of the sequence may follow. error: why it cannot be followed any further, else None.
    """

    def __init__(self, matcher: LLMatcher, mask: np.ndarray) -> None:
        self.matcher, self.mask = matcher, mask
        self.ended = False
        self.error: str | None = None

    def advance(self, token: int) -> None:
        """Take the token in; the mask is of no use until it is filled again."""
        self.matcher.consume_token(token)
        self.look()

    def look(self) -> None:
        """Take over what the matcher says of itself."""
        if self.matcher.is_error():
            self.error = self.matcher.get_error()
        self.ended = self.matcher.is_stopped()


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. Thread-safe; a state is one thread's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: width of the logits."""
        self._source, self._eos = tokenizer, sorted(eos_token_ids)
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self.words = -(-vocab_size // 32)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, GrammarState] = OrderedDict()
        self._executor = LLExecutor(min(4, os.cpu_count() or 1))

    def start(self, grammar: Grammar, param: str = "grammar") -> GrammarState:
        """The state before the first token. Takes as long as compiling takes, with the GIL given back.

        Raises InvalidRequest for what is no grammar, takes too much, or cannot begin.
        """
        with self._lock:
            first = self._kept.get(grammar)
            if first is not None:
                self._kept.move_to_end(grammar)
                return GrammarState(first.matcher.deep_copy(), first.mask)
            tokenizer = self._made_tokenizer(param)
        matcher = LLMatcher(tokenizer, _source(grammar, param), log_level=0, limits=_LIMITS)
        first = GrammarState(matcher, np.zeros(self.words, np.int32))
        if not matcher.is_error():
            self.fill([first])
        first.look()
        if first.error is not None:
            raise _refused(grammar, first.error, param)
        if first.ended or not first.mask.any():
            raise _refused(grammar, "it allows no text", param)
        with self._lock:
            self._kept[grammar] = first
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return GrammarState(matcher.deep_copy(), first.mask)

    def fill(self, states: Sequence[GrammarState]) -> None:
        """The masks of all these states, or their errors; in a few threads, with the GIL given back."""
        masks = np.zeros((len(states), self._llguidance_words), np.int32)
        matchers = [(state.matcher, row) for row, state in enumerate(states)]
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.shape[1] * 4, len(states))
        for state, mask in zip(states, masks, strict=True):
            state.mask = mask[: self.words]
            state.look()

    @property
    def _llguidance_words(self) -> int:
        return -(-self._vocab_size // 32)

    def _made_tokenizer(self, param: str) -> LLTokenizer:
        """Made when the first grammar comes: it takes a second for a large vocabulary."""
        if self._tokenizer is None:
            if not self._eos:
                raise InvalidRequest("this model names no end-of-sequence token, which a grammar needs", param)
            try:
                self._tokenizer = LLTokenizer(self._source.to_json(), n_vocab=self._vocab_size, eos_token=self._eos)
            except ValueError as error:
                raise InvalidRequest(
                    f"{self._source.name} has a tokenizer that grammars cannot be followed with: {error}", param
                ) from error
        return self._tokenizer


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

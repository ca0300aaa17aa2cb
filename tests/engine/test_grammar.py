"""Grammars: what is refused and how, and what they allow next."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.grammar import Grammars, check_grammar
from engine.request import Grammar, InvalidRequest
from engine.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
VOCAB = 600  # wider than the demo's 512 tokens, as padded models are


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(DEMO)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    yield made
    made.close()


def _allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def _walk(grammars: Grammars, grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str:
    """Text of a random walk through the grammar."""
    state, pick, tokens = grammars.start(grammar), random.Random(seed), []
    while not state.ended:
        token = pick.choice(_allowed(state.mask))
        state.advance(token)
        assert state.error is None
        grammars.look_ahead([state])
        if token not in tokenizer.eos_token_ids:
            tokens.append(token)
        assert len(tokens) < 2000
    return tokenizer.decode(tokens)


REFUSED = [
    (Grammar("json_schema", "{"), "not valid JSON"),
    (Grammar("json_schema", "[" * 60_000), "not valid JSON"),
    (Grammar("json_schema", "[]"), "a JSON list, not dict"),
    (Grammar("json_schema", '{"type": "strng"}'), "Invalid type: strng"),
    (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
    (Grammar("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'), "does not fetch"),
    (Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'), "does not fetch"),
    (Grammar("json_schema", '{"type": "string", "title": "' + "x" * 70_000 + '"}'), "at most 65536"),
    (Grammar("regex", "[a-"), "unclosed character class"),
    (Grammar("choice", "[]"), "one string or more"),
    (Grammar("choice", '["a", 1]'), "one string or more"),
    (Grammar("lark", "start: foo"), "unknown name"),
    (Grammar("lark", ""), "grammar cannot be used"),
]


@pytest.mark.parametrize(("grammar", "reason"), REFUSED)
def test_what_is_no_grammar_is_refused_with_the_reason(grammars: Grammars, grammar: Grammar, reason: str) -> None:
    for check in (check_grammar, grammars.start):
        with pytest.raises(InvalidRequest, match=reason) as caught:
            check(grammar, "response_format")
        assert caught.value.param == "response_format"
        assert len(str(caught.value)) < 700


def _branches() -> Grammar:
    part = {"anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "string"}}} for i in range(4)]}
    return Grammar("json_schema", json.dumps({"allOf": [part] * 12}))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(a{1,1000}){1,1000}"),
        Grammar("regex", "(?:a|b)*a(?:a|b){20}c"),
        Grammar("lark", 'start: s\ns: s s | s s s | "a" | ""'),
        Grammar("json_schema", json.dumps({"enum": ["x" * 20 + str(i) for i in range(2000)]})),
        _branches(),
    ],
)
def test_no_grammar_takes_long_or_much(grammars: Grammars, grammar: Grammar) -> None:
    """Either it is refused, or each of its steps is bounded."""
    started = time.thread_time()
    try:
        state = grammars.start(grammar)
    except InvalidRequest:
        assert time.thread_time() - started < 2
        return
    for _ in range(50):
        if state.ended:
            break
        started = time.process_time()
        state.advance(_allowed(state.mask)[-1])
        grammars.look_ahead([state])
        assert time.process_time() - started < 0.5


def test_tokens_mean_the_same_bytes_to_both(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammars.start(Grammar("regex", "a"))
    theirs = grammars._tokenizer
    assert theirs is not None
    assert theirs.vocab_size == VOCAB
    special = set(tokenizer.special_tokens.values())
    for token in range(tokenizer.vocab_size):
        ours = tokenizer.token_bytes(token)
        if ours != b"\xff" and tokenizer.token_text(token) not in special:  # no byte of UTF-8
            assert theirs.decode_bytes([token]) == ours, token


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("choice", json.dumps(["yes", "no", 'a"b\n/\\', "ü\u2028", "start: x"])),
        ("regex", "[a-f]{2,6}/\\d{1,3}"),
        ("lark", 'start: "a" b+\nb: "(" b? ")"'),
        ("json_schema", '{"type": "array", "items": {"type": "integer"}, "maxItems": 4}'),
    ],
)
def test_every_walk_is_of_the_grammar(
    grammars: Grammars, tokenizer: Tokenizer, kind: str, text: str, seed: int
) -> None:
    found = _walk(grammars, Grammar(kind, text), tokenizer, seed)  # pyright: ignore[reportArgumentType]
    if kind == "choice":
        assert found in json.loads(text)
    elif kind == "regex":
        assert re.fullmatch(text, found)
    elif kind == "lark":
        assert found.startswith("a(")
        assert found.count("(") == found.count(")")
    else:
        assert all(isinstance(item, int) for item in json.loads(found))
        assert len(json.loads(found)) <= 4


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_may_be_indented_but_has_no_endless_blanks(grammars: Grammars, tokenizer: Tokenizer, kind: str) -> None:
    value = {"a": [1, {"b": [[], 2]}], "c": {}}
    schema = "" if kind == "json_object" else json.dumps({"type": "object", "properties": {"a": {}, "c": {}}})

    def accepts(text: str) -> bool:
        state, tokens = grammars.start(Grammar(kind, schema)), tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportArgumentType]
        return state.matcher.validate_tokens(tokens) == len(tokens)

    for indent in (None, 0, 1, 2, 4, "\t"):
        assert accepts(json.dumps(value, indent=indent)), indent
    assert accepts(json.dumps(value, separators=(",", ":")))
    assert accepts(json.dumps(value, indent=2).replace("\n", "\r\n\n"))
    for blanks in ("   ", "\n\n\n", "\n" + " " * 17, " \n", "\n \n"):
        assert not accepts('{"a": [1,' + blanks + "2]}"), blanks


def test_states_of_one_grammar_do_not_know_each_other(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = Grammar("choice", '["ab", "ba"]')
    one, other = grammars.start(grammar), grammars.start(grammar)
    token = next(token for token in _allowed(one.mask) if tokenizer.token_text(token) == "a")
    one.advance(token)
    grammars.look_ahead([one])
    assert token in _allowed(other.mask)
    assert token not in _allowed(one.mask)
    assert max(_allowed(other.mask)) < 512  # nothing beyond the tokenizer's own


def test_a_token_that_is_not_allowed_is_an_error_of_that_state_alone(grammars: Grammars) -> None:
    one, other = (grammars.start(Grammar("regex", "ab")) for _ in range(2))
    one.advance(next(token for token in range(512) if token not in _allowed(one.mask)))
    grammars.look_ahead([one, other])
    assert one.error
    assert other.error is None
    assert other.mask.any()


def test_many_threads_start_grammars_at_once(tokenizer: Tokenizer) -> None:
    fresh = Grammars(tokenizer, VOCAB, tokenizer.eos_token_ids)
    wanted = [Grammar("choice", json.dumps([str(number % 200)])) for number in range(400)]
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(fresh.start, wanted))
    assert all(len(_allowed(state.mask)) >= 1 for state in states)
    assert len(fresh._kept) <= 128


def test_a_model_without_an_end_of_sequence_takes_no_grammar(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="names no end-of-sequence token"):
        Grammars(tokenizer, VOCAB, ()).start(Grammar("json_object"))

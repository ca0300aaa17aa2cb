"""Calls from another Ray application, which has Ray and nothing of ours."""

from __future__ import annotations

import pytest

from examples.demo.words import answer, held_out_prompts

from .adapters import publish
from .server import BASE_MODEL

PROMPT = held_out_prompts(1)[0]
GREEDY = {"temperature": 0, "max_tokens": 80}


def test_generate_takes_and_gives_plain_dicts(other):
    made = other.call("generate", {"model": "shout", "prompt": PROMPT} | GREEDY)
    assert made["text"] == answer(PROMPT, "shout")
    assert made["finish_reason"] == "stop" and made["model"] == "shout"
    assert made["usage"]["completion_tokens"] == len(made["token_ids"])
    assert made["logprobs"] is None and len(made["choices"]) == 1


def test_generate_chats(other):
    messages = [{"role": "user", "content": PROMPT}]
    made = other.call("generate", {"model": "json", "messages": messages} | GREEDY)
    assert made["text"] == answer(PROMPT, "json")


def test_generate_gives_every_choice_and_log_probabilities(other):
    made = other.call("generate", {"model": BASE_MODEL, "prompt": [PROMPT, PROMPT], "logprobs": 2} | GREEDY)
    assert [choice["text"] for choice in made["choices"]] == [answer(PROMPT)] * 2
    first = made["choices"][0]
    assert len(first["logprobs"]) == len(first["token_ids"])
    assert all(len(token["top"]) == 2 and token["logprob"] <= 0 for token in first["logprobs"])
    assert (
        made["usage"]["prompt_tokens"]
        == 2 * other.call("generate", {"model": BASE_MODEL, "prompt": PROMPT} | GREEDY)["usage"]["prompt_tokens"]
    )


def test_a_prompt_alone_is_scored(other):
    made = other.call("generate", {"model": "shout", "prompt": PROMPT, "prompt_logprobs": 1, "max_tokens": 0})
    first, *told = made["prompt_logprobs"]
    assert (made["text"], made["token_ids"], made["finish_reason"], first) == ("", [], "length", None)
    assert len(told) == made["usage"]["total_tokens"] - 1
    assert all(token["logprob"] <= token["top"][0][1] <= 0 for token in told)


def test_stream_yields_pieces_that_make_the_whole(other):
    pieces = other.call("stream", {"model": "mirror", "prompt": PROMPT} | GREEDY, stream=True)
    assert "".join(piece["text"] for piece in pieces) == answer(PROMPT, "mirror")
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1]["usage"]["completion_tokens"] == sum(len(piece["token_ids"]) for piece in pieces)


def test_models(other):
    assert BASE_MODEL in [model["id"] for model in other.call("models")]


@pytest.mark.parametrize(
    ("request_", "kind", "status", "param"),
    [
        ({"model": "nobody", "prompt": PROMPT}, "LookupError", 404, "model"),
        ({"model": BASE_MODEL}, "ValueError", 400, "prompt"),
        ({"model": BASE_MODEL, "prompt": PROMPT, "top_p": 2}, "ValueError", 400, "top_p"),
        ({"model": BASE_MODEL, "prompt": "robot " * 5000}, "ValueError", 400, "prompt"),
        ({"model": "handle-dora", "prompt": PROMPT}, "ValueError", 422, "model"),
        ("robot", "ValueError", 400, None),
    ],
)
def test_errors_are_builtin_exceptions_with_the_fields_of_the_envelope(server, other, request_, kind, status, param):
    publish(server, "handle-dora", like="shout", use_dora=True)
    for method, stream in (("generate", False), ("stream", True)):
        answered = other.ask(method, request_, stream=stream)
        error = answered["error"]
        assert kind in error["kinds"] and (error["status"], error["param"]) == (status, param)
        assert error["message"]
        assert answered["modules"] == [], "an error must load without anything of ours"

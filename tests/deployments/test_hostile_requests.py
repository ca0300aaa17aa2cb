"""Requests that no honest client sends: each is refused by name, and nobody else notices."""

from __future__ import annotations

import json

import pytest

from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError
from deployments.tenants.caller import Caller

from .conftest import BASE_MODEL

PROMPT = "robot, old, eats, school"
JSON = {"content-type": "application/json"}


async def post(http, path="/v1/completions", **body):
    response = await http.post(path, json={"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 2} | body)
    return response.status_code, response.json().get("error")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_k": 2**63}, "top_k"),  # would overflow the tensor that all rows of a step share
        ({"prompt": [10**30], "echo": True}, "prompt"),
        ({"prompt": [2**31 - 1], "echo": True}, "prompt"),
        ({"stop": ["x"] * 17}, "stop"),  # every one is searched for at every token, in the step loop
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids"),
        ({"model": "x" * 5000}, "model"),
    ],
)
async def test_what_would_cost_others_is_refused_by_name(http, engine, body, param):
    status, error = await post(http, **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"]) < 1000, "a refusal does not send the whole of it back"
    assert engine.healthy


async def test_sixteen_stop_strings_are_fine(http):
    assert (await post(http, stop=[f"stop {i}" for i in range(16)]))[0] == 200


async def test_a_template_argument_cannot_take_the_place_of_ours(http):
    messages = [{"role": "user", "content": PROMPT}]
    for name in ("self", "messages", "tools", "documents"):
        status, _ = await post(http, "/v1/chat/completions", messages=messages, chat_template_kwargs={name: 1})
        assert status == 200, name


async def test_too_many_completions_are_refused_before_any_text_is_read(service, monkeypatch):
    def read(*_):
        raise AssertionError("tokenized")

    monkeypatch.setattr(service, "_prompts", read)
    for many in ({"prompt": ["a"] * 1000}, {"n": 10**9}):
        with pytest.raises(ApiError, match="over the limit"):
            await service.start(
                CompletionBody(**({"model": BASE_MODEL, "prompt": PROMPT} | many)), stream=False, caller=Caller()
            )


async def test_what_does_not_fit_the_context_has_openais_code(http):
    for body in ({"prompt": [5] * 600}, {"max_tokens": 10_000}):
        status, error = await post(http, **body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
    assert (await post(http, max_tokens=0))[1]["code"] is None


async def test_text_that_cannot_fit_is_refused_without_being_tokenized(http):
    text = "robot, " * 5000
    chat = {"messages": [{"role": "user", "content": text}], "chat_template_kwargs": {"most_tokens": 10**9}}
    for path, body, param in (
        ("/v1/completions", {"prompt": ["fine", text]}, "prompt"),
        ("/v1/chat/completions", chat, "messages"),
    ):
        status, error = await post(http, path, **body)
        assert (status, error["param"], error["code"]) == (400, param, "context_length_exceeded")
        assert "bytes, too many" in error["message"] and len(error["message"]) < 1000


async def test_a_lone_surrogate_is_refused_naming_what_the_client_sent(http):
    chat = {"messages": [{"role": "user", "content": "a\ud800b"}]}
    for path, body, param in (
        ("/v1/completions", {"prompt": "a\ud800b"}, "prompt"),
        ("/v1/chat/completions", chat, "messages"),
    ):
        content = json.dumps({"model": BASE_MODEL, "max_tokens": 1} | body).encode()
        response = await http.post(path, content=content, headers=JSON)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, None)
        assert "lone surrogate" in error["message"]


async def test_a_body_over_the_limit_is_413_by_its_declared_length_and_by_its_real_one(http, service):
    limit = service.limits.max_body_bytes
    whole = json.dumps({"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 1}).encode()
    sent = 0

    async def pieces(size):
        nonlocal sent
        for start in range(0, size, 1024):
            piece = whole.ljust(size)[start : start + 1024]  # JSON may end in white space
            sent += len(piece)
            yield piece

    for content in (whole.ljust(limit + 1), pieces(limit * 4)):
        response = await http.post("/v1/completions", content=content, headers=JSON)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (413, "body_too_large", "invalid_request_error")
        assert str(limit) in error["message"] and "max_body_bytes" in error["message"]
    assert sent < limit * 2, "the rest was not read"
    for content in (whole.ljust(limit), pieces(limit)):
        assert (await http.post("/v1/completions", content=content, headers=JSON)).status_code == 200


async def test_a_path_with_a_slash_too_many_is_404_not_a_redirect(http):
    response = await http.post("/v1/completions/", json={})
    assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"

"""Every refusal a client can meet, in OpenAI's envelope."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from .adapters import publish
from .server import BASE_MODEL

PROMPT = "robot, old, eats, school"


def post(http: httpx.Client, path: str = "/v1/completions", **body) -> tuple[httpx.Response, dict]:
    response = http.post(path, json={"model": BASE_MODEL, "prompt": PROMPT} | body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response, error


def test_an_unknown_model_is_404_and_says_where_to_look(http):
    response, error = post(http, model="nobody")
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "nobody" in error["message"] and "/v1/models" in error["message"]


def test_a_reference_outside_the_allow_list_is_404(http):
    for model in ("hub:someone/else", "local:/etc", "../adapters/shout"):
        response, error = post(http, model=model)
        assert (response.status_code, error["code"]) == (404, "model_not_found")


def test_an_adapter_that_cannot_be_applied_whole_is_422_with_the_reason(server, http):
    publish(server, "dora", like="shout", use_dora=True)
    response, error = post(http, model="dora")
    assert (response.status_code, error["code"], error["param"]) == (422, "adapter_refused", "model")
    assert "dora" in error["message"].lower() and str(server.folder) not in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"stop": [1]}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": [10**6]}, "prompt"),
    ],
)
def test_a_wrong_or_unsupported_field_is_400_by_name(http, body, param):
    response, error = post(http, **body)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_a_wrong_or_unsupported_chat_field_is_400_by_name(http, body, param):
    messages = [{"role": "user", "content": PROMPT}]
    response, error = post(http, "/v1/chat/completions", **({"messages": messages} | body))
    assert (response.status_code, error["param"]) == (400, param)


def test_fields_that_nobody_knows_are_ignored(http):
    body = {"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 1, "store": True, "invented_by_a_client": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_a_body_that_is_no_json_is_400(http):
    response = http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


def test_a_body_over_the_limit_is_413_whether_or_not_it_says_its_length(http):
    for content in (b" " * 5_000_000, (b" " * 65_536 for _ in range(1000))):
        response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


def test_a_prompt_longer_than_the_context_is_400_also_when_streaming(http):
    for stream in (False, True):
        response, error = post(http, prompt="robot, " * 5000, stream=stream)
        assert (response.status_code, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")


def test_a_number_that_no_tensor_holds_is_400_and_every_replica_lives_on(http, other):
    for body in ({"top_k": 2**63}, {"top_k": 10**30}, {"seed": 2**63}, {"prompt": [2**63]}, {"max_tokens": 2**63}):
        response, error = post(http, temperature=1, **body)
        assert (response.status_code, error["param"]) == (400, next(iter(body)))
    assert all(one["healthy"] for one in other.call("fleet_stats"))


def test_an_error_of_a_stream_has_its_status(http):
    response, error = post(http, model="nobody", stream=True)
    assert response.status_code == 404 and error["code"] == "model_not_found"


def test_unknown_routes_and_methods_have_the_envelope_too(http):
    missing = http.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"


def test_health(http):
    assert http.get("/health").status_code == 200


async def test_a_full_queue_is_503_with_retry_after(client: openai.AsyncOpenAI, server, other):
    engine = server.config["engine"]
    room = 2 * (engine["max_rows"] + engine["max_waiting"])

    async def many():
        return await client.completions.create(
            model=BASE_MODEL, prompt=[PROMPT] * 100, max_tokens=64, extra_body={"ignore_eos": True}
        )

    results = await asyncio.gather(*(many() for _ in range(room // 100 + 2)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, openai.APIStatusError)]
    assert refused and len(refused) < len(results), "some fit and some do not"
    assert all(error.status_code == 503 and error.code == "overloaded" for error in refused)
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)

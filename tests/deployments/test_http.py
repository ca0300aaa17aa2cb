"""The OpenAI endpoints over a real engine, without Ray."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from deployments.api.http_app import GenerationStream
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ReplicaLost
from deployments.tenants.caller import Caller
from engine.request import GenerationFailed
from examples.demo.words import answer, held_out_prompts

from .conftest import BASE_MODEL

PROMPT = held_out_prompts(1)[0]
GREEDY = {"temperature": 0, "max_tokens": 80}


async def complete(http: httpx.AsyncClient, **body):
    return await http.post("/v1/completions", json={"model": BASE_MODEL, "prompt": PROMPT} | GREEDY | body)


async def chat(http: httpx.AsyncClient, **body):
    messages = [{"role": "user", "content": PROMPT}]
    return await http.post("/v1/chat/completions", json={"model": BASE_MODEL, "messages": messages} | GREEDY | body)


def events_of(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def idle(engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.slots_in_use == 0 and stats.free_pages == stats.num_pages


async def test_token_ids_and_lists_of_them_are_prompts_too(http, engine):
    ids = engine.tokenizer.encode(PROMPT)
    as_ids = (await complete(http, model="shout", prompt=ids)).json()
    assert as_ids["choices"][0]["text"] == answer(PROMPT, "shout")
    assert as_ids["usage"]["prompt_tokens"] == len(ids)
    several = (await complete(http, model="shout", prompt=[ids, ids])).json()
    assert [choice["text"] for choice in several["choices"]] == [answer(PROMPT, "shout")] * 2
    assert several["usage"]["prompt_tokens"] == 2 * len(ids)


async def test_stop_strings_and_lengths_end_a_completion(http):
    whole = answer(PROMPT)
    stopped = (await complete(http, stop=[" in"])).json()["choices"][0]
    assert stopped["text"] == whole.split(" in")[0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", " in")
    short = (await complete(http, max_tokens=3)).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    default = (await complete(http, max_tokens=None, ignore_eos=True)).json()
    assert default["usage"]["completion_tokens"] == 16  # OpenAI's default for this endpoint


async def test_a_seed_makes_n_different_samples_that_are_the_same_every_time(http):
    ask = {"temperature": 2.0, "seed": 7, "n": 4, "max_tokens": 12}
    first, second = [[choice["text"] for choice in (await complete(http, **ask)).json()["choices"]] for _ in range(2)]
    assert first == second and len(set(first)) > 1
    alone = (await complete(http, **(ask | {"n": 1}))).json()["choices"][0]["text"]
    assert alone == first[0]


async def test_completion_log_probabilities(http):
    logprobs = (await complete(http, logprobs=3)).json()["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]).startswith(answer(PROMPT))
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())  # greedy: the chosen one is the likeliest


async def test_the_chosen_token_is_among_the_likeliest_also_when_it_is_not_one(http):
    logprobs = (await complete(http, temperature=5, seed=1, logprobs=1, max_tokens=20)).json()["choices"][0]["logprobs"]
    tops = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    assert all(top[token] == value and len(top) <= 2 for token, value, top in tops)
    assert any(len(top) == 2 for top in logprobs["top_logprobs"])


async def test_streamed_log_probabilities_equal_whole_ones(http):
    whole = (await complete(http, logprobs=1)).json()["choices"][0]["logprobs"]
    pieces = [event["choices"][0]["logprobs"] for event in events_of(await complete(http, logprobs=1, stream=True))]
    for field, expected in whole.items():
        assert [value for piece in pieces for value in piece[field]] == expected


async def test_chat_log_probabilities(http):
    choice = (await chat(http, logprobs=True, top_logprobs=2)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == answer(PROMPT)
    assert all(
        len(token["top_logprobs"]) == 2 and bytes(token["bytes"]).decode() == token["token"] for token in content
    )


async def test_chat_log_probabilities_carry_the_bytes_of_parts_of_characters(http):
    ask = {"logprobs": True, "top_logprobs": 20, "temperature": 5.0, "seed": 3, "max_tokens": 100, "ignore_eos": True}
    whole = (await chat(http, **ask)).json()["choices"][0]["logprobs"]["content"]
    entries = [entry for token in whole for entry in (token, *token["top_logprobs"])]
    assert all(bytes(entry["bytes"]).decode(errors="replace") == entry["token"] for entry in entries)
    parts = [bytes(entry["bytes"]) for entry in entries if "\ufffd" in entry["token"]]
    assert parts and "\ufffd".encode() not in parts
    assert any("\ufffd" in token["token"] for token in whole), "chosen tokens too"
    events = events_of(await chat(http, stream=True, **ask))
    deltas = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [token for delta in deltas for token in delta["content"]] == whole


async def test_the_developer_is_the_system(http):
    def messages(role):
        return [{"role": role, "content": "spanish", "tool_call_id": "1"}, {"role": "user", "content": PROMPT}]

    system, developer = [(await chat(http, messages=messages(role))).json() for role in ("system", "developer")]
    assert developer["choices"] == system["choices"] and developer["usage"] == system["usage"]
    tool = await chat(http, messages=messages("tool"))
    assert (tool.status_code, tool.json()["error"]["param"]) == (400, "messages"), "this template takes no other role"


async def test_a_stream_of_several_choices_with_echo_and_usage(http):
    response = await complete(http, model="mirror", n=2, echo=True, stream=True, stream_options={"include_usage": True})
    events = events_of(response)
    texts = ["", ""]
    for event in events[:-1]:
        assert event["usage"] is None
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [PROMPT + answer(PROMPT, "mirror")] * 2
    assert events[-1]["choices"] == [] and events[-1]["usage"]["prompt_tokens"] > 0
    assert len({event["id"] for event in events}) == 1


async def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(http):
    events = events_of(await chat(http, model="json", stream=True))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["finish_reason"] == "stop" and events[-1]["choices"][0]["delta"] == {}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == answer(PROMPT, "json")


async def test_text_parts_and_the_template_arguments_reach_the_template(http):
    parts = [{"type": "text", "text": PROMPT.split(", ")[0] + ","}, {"type": "text", "text": PROMPT.split(", ", 1)[1]}]
    joined = [{"role": "user", "content": PROMPT.replace(", ", ",\n", 1)}]
    as_parts = await chat(http, messages=[{"role": "user", "content": parts}])
    as_text = await chat(http, messages=joined)
    assert as_parts.json()["choices"][0]["message"] == as_text.json()["choices"][0]["message"]
    clash = await chat(http, continue_final_message=True)
    assert clash.status_code == 400 and clash.json()["error"]["param"] == "continue_final_message"


async def test_a_prompt_longer_than_the_context_names_what_the_client_sent(http):
    response = await chat(http, messages=[{"role": "user", "content": "robot " * 1000}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    response = await complete(http, max_tokens=10_000)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    for sent in ({"max_completion_tokens": 10_000}, {"max_completion_tokens": 10_000, "max_tokens": 1}):
        error = (await chat(http, **sent)).json()["error"]
        assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")
        assert "lower max_completion_tokens to" in error["message"]
    error = (await chat(http, max_tokens=10_000)).json()["error"]
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")


async def test_an_unreachable_source_is_503_with_retry_after(http):
    response = await complete(http, model="hub:acme/tenant")
    assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["code"] == "adapter_unavailable"


async def test_a_full_queue_is_503_and_leaves_nothing_running(http, engine):
    many = [complete(http, prompt=[PROMPT] * 16, max_tokens=100, ignore_eos=True) for _ in range(4)]
    responses = await asyncio.gather(*many)
    statuses = sorted(response.status_code for response in responses)
    assert statuses[0] == 200 and statuses[-1] == 503
    refused = next(response for response in responses if response.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded" and int(refused.headers["retry-after"]) >= 1
    for _ in range(200):
        if idle(engine):
            break
        await asyncio.sleep(0.01)
    assert idle(engine)


async def test_what_breaks_after_the_status_is_an_event_of_its_own(http, fleet, monkeypatch):
    real = fleet.generate

    async def dies(request, model, record):
        async for chunk in real(request, model, record):
            yield chunk
            raise ReplicaLost("the replica that ran this request died", started=True)

    monkeypatch.setattr(fleet, "generate", dies)
    *pieces, last = events_of(await complete(http, stream=True))
    assert pieces and pieces[0]["choices"][0]["text"]
    assert last["error"]["code"] == "replica_died" and last["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (ZeroDivisionError("secret"), "internal_error", False),
        (GenerationFailed("logits are no numbers"), "generation_failed", True),
    ],
)
async def test_an_internal_error_is_500_and_only_our_own_words_are_told(http, fleet, monkeypatch, raised, code, told):
    async def breaks(request, model, record):
        raise raised
        yield

    monkeypatch.setattr(fleet, "generate", breaks)
    error = (await complete(http)).json()["error"]
    assert error["code"] == code and (str(raised) in error["message"]) is told


async def test_a_response_that_is_never_sent_ends_its_generation(service, engine):
    """The client left between the first token and the first byte."""
    body = CompletionBody(model=BASE_MODEL, prompt=PROMPT, max_tokens=400, ignore_eos=True, stream=True)
    generation = await service.start(body, stream=True, caller=Caller())
    assert not idle(engine)

    async def broken_send(_):
        raise OSError("connection lost")

    async def receive():
        await asyncio.sleep(60)

    with pytest.raises(BaseException) as caught:
        await GenerationStream(generation, body)({"type": "http", "asgi": {}}, receive, broken_send)
    assert "connection lost" in repr(caught.value) or caught.group_contains(OSError)
    for _ in range(100):
        if idle(engine):
            break
        await asyncio.sleep(0.01)
    assert idle(engine)

"""Tools over HTTP: what the template is told, forced calls, and calls that the model makes by itself, streamed too."""

from __future__ import annotations

import json

import jsonschema
import pytest

from engine.request import GenerationChunk

from .conftest import BASE_MODEL
from .test_http import events_of

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
ASKED = [{"role": "user", "content": "robot, old, eats, school"}]


async def chat(http, **body):
    body = {"model": BASE_MODEL, "messages": ASKED, "tools": TOOLS, "max_tokens": 200, "seed": 2} | body
    return await http.post("/v1/chat/completions", json=body)


def speaking(*texts, finish="stop", logprobs=()):
    """A fleet whose model says these pieces."""

    async def generate(request, model, record):
        pieces = ["".join(texts)] if record.whole else list(texts)
        for count, text in enumerate(pieces, 1):
            last = finish if count == len(pieces) else None
            yield GenerationChunk(request.request_id, text, (), 7, count, logprobs, last)

    return generate


def joined(events):
    """The message that a client puts together, and the finish reason. The laws of OpenAI's deltas on the way."""
    content, calls, finish = None, [], None
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    for event in events:
        (choice,) = event["choices"]
        assert finish is None, "nothing comes after the finish reason"
        finish, delta = choice["finish_reason"], choice["delta"]
        if delta.get("content"):
            content = (content or "") + delta["content"]
        for part in delta.get("tool_calls", []):
            if part["index"] == len(calls):
                assert part["id"] and part["type"] == "function" and part["function"]["arguments"] == ""
                calls.append([part["function"]["name"], ""])
            else:
                assert part["index"] == len(calls) - 1 and set(part) == {"index", "function"}
                assert set(part["function"]) == {"arguments"}
                calls[-1][1] += part["function"]["arguments"]
    return content, calls, finish


async def test_a_named_function_is_called_with_valid_arguments(http):
    choice = (await chat(http, tool_choice=NAMED)).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["function"]["name"] == "weather" and call["id"].startswith("call_")
    jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_required_call_is_one_of_the_functions(http, parallel):
    for seed in range(3):
        answer = await chat(http, tool_choice="required", parallel_tool_calls=parallel, seed=seed, max_tokens=400)
        choice = answer.json()["choices"][0]
        calls = choice["message"]["tool_calls"]
        assert choice["finish_reason"] in ("tool_calls", "length") and choice["message"]["content"] is None
        assert len(calls) == 1 or parallel
        schemas = {"weather": CITY, "now": {"type": "object", "maxProperties": 0}}
        for call in calls if choice["finish_reason"] == "tool_calls" else calls[:-1]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])


async def test_streamed_forced_calls_are_the_whole_ones(http):
    for tool_choice in (NAMED, "required"):
        whole = (await chat(http, tool_choice=tool_choice)).json()["choices"][0]
        content, calls, finish = joined(events_of(await chat(http, tool_choice=tool_choice, stream=True)))
        assert (content, finish) == (None, whole["finish_reason"])
        assert calls == [
            [call["function"]["name"], call["function"]["arguments"]] for call in whole["message"]["tool_calls"]
        ]


SAID = ("Let me ", 'see.\n<tool_call>{"name": "wea', 'ther", "arguments": {"city"', ': "Oslo"}}</tool', "_call>")


async def test_calls_that_the_model_makes_by_itself(http, service, fleet, monkeypatch):
    monkeypatch.setattr(service, "_tool_form", "hermes")
    monkeypatch.setattr(fleet, "generate", speaking(*SAID))
    choice = (await chat(http)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    content, calls, finish = joined(events_of(await chat(http, stream=True)))
    assert (content, calls, finish) == ("Let me see.", [["weather", '{"city": "Oslo"}']], "tool_calls")


@pytest.mark.parametrize("body", [{"tool_choice": "none"}, {"tools": None}, {}])
async def test_without_tools_or_a_format_it_is_content(http, service, fleet, monkeypatch, body):
    monkeypatch.setattr(service, "_tool_form", None if body == {} else "hermes")
    monkeypatch.setattr(fleet, "generate", speaking(*SAID))
    choice = (await chat(http, **body)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "".join(SAID), "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_text_and_no_call_finishes_as_it_did(http, service, fleet, monkeypatch):
    monkeypatch.setattr(service, "_tool_form", "hermes")
    monkeypatch.setattr(fleet, "generate", speaking("a <tool", "box> b "))
    choice = (await chat(http)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "a <toolbox> b ", "refusal": None}
    assert joined(events_of(await chat(http, stream=True))) == ("a <toolbox> b ", [], "stop")


async def test_calls_cut_by_the_limit_and_calls_that_are_not_to_be_parallel(http, service, fleet, monkeypatch):
    monkeypatch.setattr(service, "_tool_form", "hermes")
    monkeypatch.setattr(fleet, "generate", speaking(*SAID[:3], finish="length"))
    choice = (await chat(http)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city"'
    monkeypatch.setattr(fleet, "generate", speaking(*SAID, *SAID))
    assert len((await chat(http)).json()["choices"][0]["message"]["tool_calls"]) == 2
    assert len((await chat(http, parallel_tool_calls=False)).json()["choices"][0]["message"]["tool_calls"]) == 1
    assert len(joined(events_of(await chat(http, parallel_tool_calls=False, stream=True)))[1]) == 1


async def test_streamed_log_probabilities_of_calls_are_the_whole_ones(http):
    ask = {"tool_choice": NAMED, "logprobs": True, "top_logprobs": 1}
    whole = (await chat(http, **ask)).json()["choices"][0]["logprobs"]["content"]
    events = events_of(await chat(http, stream=True, **ask))
    logs = [event["choices"][0]["logprobs"] for event in events]
    assert whole and [token for one in logs if one for token in one["content"]] == whole


async def test_the_template_reads_tools_calls_and_their_answers(http, service, monkeypatch):
    seen = {}

    def encode_chat(messages, most, /, **options):
        seen.update(messages=messages, **options)
        return [5, 6]

    monkeypatch.setattr(service.tokenizer, "encode_chat", encode_chat)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    assert (await chat(http, messages=messages, max_tokens=1)).status_code == 200
    assert seen["tools"] == TOOLS
    assert seen["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert seen["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    seen.clear()
    assert (await chat(http, tool_choice="none", max_tokens=1)).status_code == 200
    assert "tools" not in seen


CALLED = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[0]] * 2}, "tools"),
        ({"tools": [TOOLS[0]] * 129}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"messages": [*ASKED, CALLED]}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": [*ASKED, {"role": "tool", "content": "rain"}]}, "messages[1]"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(http, body, param):
    answer = await chat(http, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(answer.text) < 1000


async def test_arguments_of_a_call_in_a_message_must_be_an_object(http):
    for arguments in ("[1]", "{", "nope"):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = await chat(http, messages=[*ASKED, {"role": "assistant", "tool_calls": [call]}])
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[1].tool_calls")

"""The openai client's own calls against the real server: structured output, tools, and errors as its exceptions."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from .server import BASE_MODEL

ASKED = [{"role": "user", "content": "robot, old, eats, school"}]
ASK = {"model": BASE_MODEL, "messages": ASKED, "temperature": 0, "max_tokens": 450}


class Scene(BaseModel):
    """What the client makes a JSON schema of."""

    who: Literal["robot", "cat"]
    age: int = Field(ge=0, le=200)
    places: list[Literal["school", "garden"]] = Field(min_length=1, max_length=2)


class Weather(BaseModel):
    """A function's arguments."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": Weather.model_json_schema()}},
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


async def test_structured_output_is_parsed(client: openai.AsyncOpenAI):
    made = await client.chat.completions.parse(response_format=Scene, **ASK)
    scene = made.choices[0].message.parsed
    assert isinstance(scene, Scene) and scene.places
    assert made.choices[0].finish_reason == "stop" and made.choices[0].message.refusal is None
    assert made.system_fingerprint and made.system_fingerprint.startswith("fp_")
    made = await client.chat.completions.create(**ASK, extra_body={"guided_regex": "[0-9]{4}"})
    assert made.choices[0].message.content.isdecimal()


async def test_forced_tools_whole_and_streamed(client: openai.AsyncOpenAI):
    for tool_choice, finish in ((NAMED, "stop"), ("required", "tool_calls")):
        ask = ASK | {"tools": TOOLS, "tool_choice": tool_choice, "parallel_tool_calls": False}
        choice = (await client.chat.completions.create(**ask)).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == (finish, None)
        if call.function.name == "weather":
            Weather.model_validate_json(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}
        async with client.chat.completions.stream(**ask) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0]
        assert streamed.finish_reason == finish and len(streamed.message.tool_calls) == 1
        assert streamed.message.tool_calls[0].function.name == call.function.name
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


async def test_biases_best_of_and_penalties(client: openai.AsyncOpenAI):
    best = await client.completions.create(
        model=BASE_MODEL, prompt="robot, old, eats, school", n=1, best_of=3, max_tokens=5, temperature=1.5, seed=3,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, extra_body={"min_tokens": 5},
    )  # fmt: skip
    assert len(best.choices) == 1 and best.usage.completion_tokens == 15


async def test_errors_are_the_clients_exceptions_and_carry_the_request_id(client: openai.AsyncOpenAI):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            **ASK, extra_body={"guided_json": {"type": "objekt"}}, extra_headers={"x-request-id": "mine-1"}
        )
    assert refused.value.param == "guided_json" and refused.value.request_id == "mine-1"
    assert refused.value.response.headers.get_list("x-request-id") == ["mine-1"]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(**(ASK | {"model": "nobody"}))
    assert missing.value.code == "model_not_found" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as twice:
        await client.chat.completions.create(**ASK, tools=[TOOLS[0]] * 2)
    assert twice.value.param == "tools"

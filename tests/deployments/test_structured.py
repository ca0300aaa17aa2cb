"""Structured output and what changes logits: which fields say what, what is refused at the edge, what comes out."""

from __future__ import annotations

import json
import re
from statistics import fmean

import jsonschema
import pytest

from deployments.protocol.chat import ChatBody
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError
from engine.request import Grammar

from .conftest import BASE_MODEL

PROMPT = "robot, old, eats, school"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "colour": {"enum": ["red", "blue"]}},
    "required": ["size", "colour"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True, "description": "x"}}


async def complete(http, **body):
    response = await http.post(
        "/v1/completions", json={"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 200} | body
    )
    return response.status_code, response.json()


async def chat(http, **body):
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": BASE_MODEL, "messages": messages, "max_tokens": 200} | body
    response = await http.post("/v1/chat/completions", json=body)
    return response.status_code, response.json()


@pytest.mark.parametrize(
    ("field", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, Grammar("json_object")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["a", 'b"']}, Grammar("choice", '["a", "b\\""]')),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
    ],
)
def test_every_field_that_says_what_the_output_must_be(field, grammar):
    assert CompletionBody(model="m", prompt="p", **field).sampling_params().grammar == grammar


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": NAMED},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
)
def test_a_schema_is_the_same_wherever_it_stands(field):
    grammar = CompletionBody(model="m", prompt="p", **field).sampling_params().grammar
    assert grammar is not None and grammar.kind == "json_schema" and json.loads(grammar.text) == SCHEMA


def test_a_grammar_in_gbnf_is_taken_too():
    body = CompletionBody(model="m", prompt="p", guided_grammar='root ::= "yes" | "no"')
    grammar = body.sampling_params().grammar
    assert grammar is not None and "::=" not in grammar.text and '"yes"' in grammar.text


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
    ],
)
def test_two_of_them_are_refused_by_name(fields):
    with pytest.raises(ApiError, match="each say what the output must be"):
        CompletionBody(model="m", prompt="p", **fields).sampling_params()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        ({"guided_json": {"type": "objekt"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 300}, "min_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 17}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
async def test_what_is_refused_at_the_edge(http, engine, body, param):
    before = engine.stats().prompt_tokens
    status, answer = await complete(http, **body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert len(answer["error"]["message"]) < 1000
    assert engine.stats().prompt_tokens == before


@pytest.mark.parametrize("field", ["guided_json", "tools", "messages", "chat_template_kwargs"])
async def test_json_of_many_levels_and_long_schemas_are_refused(http, field):
    deep: dict = {}
    for _ in range(400):
        deep = {"items": deep}
    for value in (deep, {"description": "x" * 70_000}) if field in ("guided_json", "tools") else (deep,):
        wrapped = {
            "guided_json": value,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": value}}],
            "messages": [{"role": "user", "content": "x", "extra": value}],
            "chat_template_kwargs": value,
        }[field]
        body = json.dumps({"model": BASE_MODEL, "messages": [{"role": "user", "content": "x"}]} | {field: wrapped})
        response = await http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 413) and len(response.text) < 1000


async def test_structured_outputs_hold(http):
    for field in ({"response_format": NAMED}, {"guided_json": SCHEMA}):
        status, answer = await chat(http, temperature=1.5, seed=1, **field)
        assert status == 200, answer
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)
        assert answer["choices"][0]["finish_reason"] == "stop"
    _, answer = await complete(http, guided_choice=["robot", "school"])
    assert answer["choices"][0]["text"] in ("robot", "school")
    _, answer = await complete(http, guided_regex="[0-9]{3}-[a-z]{2}")
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", answer["choices"][0]["text"])
    _, answer = await complete(http, structured_outputs={"grammar": 'root ::= "old" " " "robot"'})
    assert answer["choices"][0]["text"] == "old robot"


async def test_best_of_answers_with_the_likeliest_and_counts_them_all(http):
    ask = {"temperature": 2.0, "seed": 11, "max_tokens": 6, "ignore_eos": True}
    _, every = await complete(http, n=6, logprobs=0, **ask)
    means = [(fmean(choice["logprobs"]["token_logprobs"]), choice["text"]) for choice in every["choices"]]
    _, best = await complete(http, n=2, best_of=6, echo=True, **ask)
    expected = [text for _, text in sorted(means, key=lambda one: one[0], reverse=True)[:2]]
    assert [choice["text"] for choice in best["choices"]] == [PROMPT + text for text in expected]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"] == every["usage"] and best["usage"]["completion_tokens"] == 36


async def test_a_bias_and_a_least_number_of_tokens_reach_the_sampler(http, engine):
    (token,) = engine.tokenizer.encode("!", add_special_tokens=False)
    _, answer = await complete(http, logit_bias={str(token): 100}, max_tokens=5, temperature=0)
    assert answer["choices"][0]["text"] == "!!!!!"
    _, answer = await complete(http, min_tokens=60, max_tokens=60, temperature=0)
    assert answer["usage"]["completion_tokens"] == 60


async def test_an_answer_says_which_model_and_adapter_made_it(http):
    prints = {}
    for model in (BASE_MODEL, "shout", "mirror"):
        _, first = await complete(http, model=model, max_tokens=1)
        _, second = await chat(http, model=model, max_tokens=1)
        assert first["system_fingerprint"] == second["system_fingerprint"]
        prints[model] = first["system_fingerprint"]
    assert len(set(prints.values())) == 3 and all(one.startswith("fp_") for one in prints.values())


def test_a_chat_body_with_a_forced_call_has_the_grammar_of_its_arguments():
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    named = ChatBody(**body, tool_choice={"type": "function", "function": {"name": "f"}})
    grammar = named.sampling_params().grammar
    assert grammar is not None and json.loads(grammar.text) == SCHEMA
    assert ChatBody(**body).sampling_params().grammar is None
    with pytest.raises(ApiError, match="guided_regex both say"):
        ChatBody(**body, tool_choice="required", guided_regex="a").sampling_params()


@pytest.mark.parametrize(
    "field",
    [
        {"guided_json": {"const": "\ud800"}},
        {"guided_json": {"\udfff": 1, "type": "string", "pattern": "\ud800"}},
        {"guided_json": '{"const": "\\ud800"}'},
        {"guided_regex": "\ud800"},
        {"guided_choice": ["\ud800"]},
        {"guided_grammar": 'start: "\ud800"'},
        {"guided_grammar": 'root ::= "\ud800"'},
        {"guided_grammar": "root ::= " + "(" * 4000},
        {"guided_grammar": "root ::= " + "(" * 30_000},
        {"guided_grammar": "\n".join(f"r{i} ::= [a-z]+ r{i + 1}" for i in range(150))},
        {"guided_regex": "(" * 30_000},
        {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"guided_choice": ["\x00"]},
        {"model": "\ud800"},
        {"stop": "\ud800", "user": "\ud800"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "\ud800"}}},
    ],
)
async def test_what_no_encoding_or_parser_can_take_is_no_failure_of_ours(http, field):
    content = json.dumps({"model": BASE_MODEL, "prompt": PROMPT, "max_tokens": 2} | field)
    response = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    assert len(response.text) < 2000

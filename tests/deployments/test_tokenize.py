"""``/tokenize`` and ``/detokenize`` in vLLM's shapes."""

from __future__ import annotations

import json

import pytest

from examples.demo.words import held_out_prompts

from .conftest import BASE_MODEL

PROMPT = held_out_prompts(1)[0]
MESSAGES = [{"role": "system", "content": "spanish"}, {"role": "user", "content": PROMPT}]


async def tokenize(http, **body):
    response = await http.post("/tokenize", json=body)
    return response.status_code, response.json()


async def test_a_prompt_is_what_the_model_reads_and_comes_back(http, engine):
    for model in ({}, {"model": BASE_MODEL}, {"model": "shout"}):
        status, answer = await tokenize(http, prompt=PROMPT, **model)
        tokens = engine.tokenizer.encode(PROMPT)
        assert (status, answer) == (
            200,
            {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": None},
        )
        back = await http.post("/detokenize", json={"tokens": tokens, **model})
        assert back.json() == {"prompt": engine.tokenizer.decode(tokens, skip_special_tokens=False)}
    _, bare = await tokenize(http, prompt=PROMPT, add_special_tokens=False, return_token_strs=True)
    assert bare["tokens"] == engine.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert len(bare["token_strs"]) == bare["count"] and all(bare["token_strs"])
    assert (await http.post("/detokenize", json={"tokens": bare["tokens"]})).json() == {"prompt": PROMPT}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_chat_counts_what_its_answer_counts(http, engine):
    _, answer = await tokenize(http, model="shout", messages=MESSAGES)
    chat = {"model": "shout", "messages": MESSAGES, "max_tokens": 1}
    used = (await http.post("/v1/chat/completions", json=chat)).json()["usage"]
    assert answer["count"] == used["prompt_tokens"]
    _, without = await tokenize(http, messages=MESSAGES, add_generation_prompt=False)
    assert answer["tokens"][: without["count"]] == without["tokens"] and without["count"] < answer["count"]
    text = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()["prompt"]
    assert text == engine.tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"prompt": "robot, " * 5000}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages[0].role"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [5, 2**40]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["5"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [5], "model": "nobody"}, 404, "model"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(http, path, body, status, param):
    response = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert len(response.json()["error"]["message"]) < 1000

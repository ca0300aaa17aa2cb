"""Embeddings and tokens behind keys: what others have is not there, and what is asked for counts."""

from __future__ import annotations

from .conftest import PROMPT, authorization


def bodies(model):
    return {
        "/v1/embeddings": {"model": model, "input": PROMPT},
        "/tokenize": {"model": model, "prompt": PROMPT},
        "/detokenize": {"model": model, "tokens": [5, 6]},
    }


async def post(door, who, path, body):
    return await door.http.post(path, json=body, headers=authorization(who))


async def test_what_others_have_answers_as_what_is_not_there(door):
    for path, body in bodies("json").items():
        assert (await post(door, "globex", path, body)).status_code == 200
        hidden, missing = [await post(door, "acme", path, body | {"model": model}) for model in ("json", "jsoX")]
        assert hidden.status_code == missing.status_code == 404
        assert hidden.text.replace("json", "MODEL") == missing.text.replace("jsoX", "MODEL")
        assert (await post(door, None, path, body)).status_code == 401
        assert (await post(door, "acme", path, body | {"model": "shout"})).status_code == 200


async def test_each_counts_as_a_request_and_embeddings_by_their_tokens(door):
    asked = bodies("shout")
    statuses = [(await post(door, "limited", path, asked[path])).status_code for path in (*asked, *asked)]
    assert statuses == [200] * 5 + [429], "five a minute, two at once: each gave its place back"


async def test_an_embedding_that_is_too_large_for_the_tenant_is_refused(door):
    tokens = door.service.tokenizer.encode(PROMPT)
    many = {"model": "shout", "input": [tokens] * (400 // len(tokens) + 1)}
    refused = await post(door, "limited", "/v1/embeddings", many)
    assert refused.status_code == 400, refused.text

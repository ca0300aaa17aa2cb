"""What the service does before and around the fleet."""

from __future__ import annotations

import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterChanged
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.protocol.chat import logprobs_object
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError
from deployments.tenants.caller import Caller
from engine.request import TokenLogprob
from examples.demo.words import answer, held_out_prompts

from .conftest import DEMO, STORE

PROMPT = held_out_prompts(1)[0]


def body(**changes):
    return CompletionBody(**({"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes))


async def test_an_adapter_that_changed_meanwhile_is_looked_up_once_more(service, fleet, monkeypatch):
    real, asked = fleet.generate, []

    async def stale_once(request, model, record):
        asked.append(request.adapter_digest)
        if len(asked) == 1:
            raise AdapterChanged(model, "published anew")
        async for chunk in real(request, model, record):
            yield chunk

    monkeypatch.setattr(fleet, "generate", stale_once)
    chunks = await (await service.start(body(), stream=False, caller=Caller())).finished()
    assert chunks[0].text == answer(PROMPT, "shout") and len(asked) == 2

    async def always_stale(request, model, record):
        asked.append(request.adapter_digest)
        raise AdapterChanged(model, "published anew")
        yield

    asked.clear()
    monkeypatch.setattr(fleet, "generate", always_stale)
    with pytest.raises(AdapterChanged):
        await service.start(body(), stream=False, caller=Caller())
    assert len(asked) == 2


async def test_more_completions_than_allowed_are_refused_before_anything_runs(service, engine):
    before = engine.stats().prompt_tokens
    with pytest.raises(ApiError) as caught:
        await service.start(body(n=17), stream=False, caller=Caller())
    assert caught.value.param == "n" and engine.stats().prompt_tokens == before


async def test_each_choice_is_a_request_of_its_own_with_the_same_adapter_content(service, fleet, monkeypatch):
    real, requests = fleet.generate, []

    async def seen(request, model, record):
        requests.append(request)
        async for chunk in real(request, model, record):
            yield chunk

    monkeypatch.setattr(fleet, "generate", seen)
    await (
        await service.start(body(prompt=[PROMPT, PROMPT], n=2, seed=5, user="tenant-a"), stream=False, caller=Caller())
    ).finished()
    assert len({request.request_id for request in requests}) == 4
    assert [request.sampling.seed for request in requests] == [5, 6, 5, 6]
    assert {request.tenant for request in requests} == {"tenant-a"}
    assert len({request.adapter_digest for request in requests}) == 1
    assert all(request.adapter.startswith("local:") for request in requests)


def test_an_adapter_named_like_the_base_model_is_refused_at_the_start():
    store = StoreSettings(folders=STORE.folders, adapters={"base": f"local:{DEMO / 'adapters' / 'shout'}"})
    with pytest.raises(ValueError, match="'base' like the base model"):
        AdapterDirectory("base", Catalog(store))


def test_the_bytes_of_a_token_are_null_where_the_tokenizer_does_not_tell():
    tokens = [TokenLogprob(5, -0.5, "\ufffd", ((5, -0.5, "\ufffd"), (6, -1.0, "a")))]
    (token,) = logprobs_object(tokens, {6: b"a"}.get)["content"]
    assert token["bytes"] is None
    assert [likely["bytes"] for likely in token["top_logprobs"]] == [None, [97]]

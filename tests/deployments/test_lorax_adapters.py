"""Adapters and merges as LoRAX's clients name them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx

from deployments.api.http_app import create_http_app
from deployments.protocol.lorax import Parameters
from deployments.tenants.caller import Caller
from deployments.tenants.tenant import Tenant
from examples.demo.words import answer

from .conftest import BASE_MODEL, DEMO, STORE
from .lorax_http import PROMPT, error_of, generate, whole


async def test_an_adapter_is_found_by_name_or_by_where_it_is(http, service):
    async def begins_as(style: str, **parameters) -> None:
        text = (await whole(http, max_new_tokens=4, **parameters))["generated_text"]
        assert len(text) > 3
        assert answer(PROMPT, style).startswith(text)

    for adapter_id in ("", "__base_model__", BASE_MODEL, None):
        await begins_as("base", adapter_id=adapter_id)
    for source in ("local", "hub", "s3", None):  # a name of the operator's counts first
        await begins_as("shout", adapter_id="shout", adapter_source=source)
    folder = str(DEMO / "adapters" / "shout")
    assert error_of(await generate(http, adapter_id=folder, adapter_source="local"))[:2] == (424, "generation")
    service.directory.reconfigure(replace(STORE, folders=(), allow=(f"local:{DEMO}/adapters/*",)))
    await begins_as("shout", adapter_id=folder, adapter_source="local")
    assert error_of(await generate(http, adapter_id="mirror"))[:2] == (424, "generation")


async def test_names_go_to_the_source_that_is_said():
    names = {
        ("acme/x", None): "hub:acme/x",
        ("acme/x", "hub"): "hub:acme/x",
        ("/data/x", "local"): "local:/data/x",
        ("bucket/x", "s3"): "s3://bucket/x",
        ("bucket/x", "gs"): "gs://bucket/x",
    }
    for (adapter_id, source), reference in names.items():
        asked = Parameters.model_validate({"adapter_id": adapter_id, "adapter_source": source})
        assert asked.names_of(adapter_id) == (adapter_id, reference)
    assert Parameters.model_validate({"adapter_source": "s3"}).names_of("s3://b/x") == ("s3://b/x",)


async def test_a_merge_is_computed_once_and_served_as_any_adapter(http, engine):
    def packed() -> int:
        return engine.parts.store.stats().pack.done

    merged = {
        "ids": ["spanish", "mirror"],
        "weights": [0.9, 0.05],
        "merge_strategy": "dare_ties",
        "density": 0.95,
        "majority_sign_method": "frequency",
    }
    before = packed()
    first, second = await asyncio.gather(
        whole(http, merged_adapters=merged, max_new_tokens=8), whole(http, merged_adapters=merged, max_new_tokens=8)
    )
    named_otherwise = {**merged, "seed": 0}
    third = await whole(http, merged_adapters=named_otherwise, max_new_tokens=8)
    assert first["details"]["tokens"] == second["details"]["tokens"]
    assert first["generated_text"] == third["generated_text"]
    assert packed() == before + 1
    await whole(http, merged_adapters={**merged, "seed": 1}, max_new_tokens=1)
    assert packed() == before + 2


async def test_every_part_of_a_merge_must_be_there_and_be_allowed(http, service):
    for ids, told in ((["shout", "nobody"], "'nobody'"), (["shout", f"local:{DEMO}/adapters/mirror"], "may not name")):
        status, kind, message = error_of(await generate(http, merged_adapters={"ids": ids, "weights": [1, 1]}))
        assert (status, kind) == (424, "generation")
        assert told in message
    many = {"ids": ["shout"] * 9, "weights": [1] * 9}
    assert "at most 8" in error_of(await generate(http, merged_adapters=many))[2]

    class OneKey:
        def caller(self, key: str) -> Caller | None:
            return Caller(Tenant("acme", ("mirror", "spanish")), "tenant") if key == "acme" else None

    transport = httpx.ASGITransport(create_http_app(service, keys=OneKey()), raise_app_exceptions=False)
    key = {"authorization": "Bearer acme"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=key) as acme:
        own = {"ids": ["spanish", "mirror"], "weights": [1.0, 0.0]}
        assert (await whole(acme, merged_adapters=own))["generated_text"] == answer(PROMPT, "spanish")
        told = []
        for foreign in ("shout", "nobody", "hub:acme/x"):
            response = await generate(acme, merged_adapters={"ids": ["spanish", foreign], "weights": [1.0, 0.0]})
            status, kind, message = error_of(response)
            assert (status, kind) == (424, "generation")
            told.append(message.replace(foreign, "it"))
        assert len(set(told)) == 1  # whether it is there does not show
        assert (await generate(acme, adapter_id="shout")).status_code == 424

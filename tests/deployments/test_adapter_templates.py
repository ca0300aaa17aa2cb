"""An adapter that ships a chat template is chatted with by it, and nobody else is."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterRefused
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService
from deployments.protocol.chat import ChatBody
from deployments.tenants.caller import Caller
from deployments.tenants.tenant import Tenant
from engine.request import GenerationChunk, GenerationRequest
from examples.demo.words import answer, held_out_prompts
from tests.adapter_store.hub_server import TOKEN, HubServer, hub_asked_without_token
from tests.adapter_store.plain_adapters import adapter_files, write_adapter

from .conftest import BASE_MODEL, DEMO, LocalFleet

PROMPT = held_out_prompts(1)[0]
MESSAGES = [{"role": "user", "content": PROMPT}]
PLAIN = "{{ bos_token }}{{ messages[-1].content }}"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


class Server:
    """One gateway over a folder of adapters and a Hub."""

    def __init__(self, folder: Path, fleet: LocalFleet, hub: HubServer) -> None:
        for name in ("own", "other"):
            write_adapter(folder / "adapters" / name)
        self.hub = hub
        self._adapters = folder / "adapters"
        store = StoreSettings(
            root=folder,
            folders=("adapters",),
            allow=("hub:acme/*",),
            cache_dir="cache",
            hub_endpoint=hub.endpoint,
            hub_refresh_s=0.0,
            negative_ttl_s=0.0,
        )
        directory = AdapterDirectory(BASE_MODEL, Catalog(store), 2)
        self.service = CompletionService(directory, DEMO / "model", fleet, fleet.engine.max_model_len)
        transport = httpx.ASGITransport(create_http_app(self.service), raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def ship(self, template: str | None, name: str = "own") -> None:
        file = self._adapters / name / "chat_template.jinja"
        file.unlink(missing_ok=True) if template is None else file.write_text(template)

    def copy(self, like: str) -> None:
        shutil.copytree(DEMO / "adapters" / like, self._adapters / like)

    async def told(self, model: str, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, str]:
        """The text that a chat is to the model, or what is wrong."""
        body = {"model": model, "messages": MESSAGES} | more
        response = await self.http.post("/tokenize", json=body, headers=headers)
        if response.status_code != 200:
            error = response.json()["error"]
            return response.status_code, f"{error['code']} {error['param']}: {error['message']}"
        return 200, self.service.tokenizer.decode(response.json()["tokens"], skip_special_tokens=False)


@pytest.fixture
async def server(tmp_path: Path, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    with hub_asked_without_token(monkeypatch) as hub:
        made = Server(tmp_path, fleet, hub)
        yield made
        await made.http.aclose()
        made.service.close()


@pytest.fixture
def bases(server: Server) -> str:
    return server.service.tokenizer.render_chat(MESSAGES)


async def test_an_adapters_template_is_used_for_its_chats_and_for_nobody_elses(server: Server, bases: str) -> None:
    server.ship(PLAIN)
    assert await server.told("own") == (200, f"{server.service.tokenizer.special_tokens['bos_token']}{PROMPT}")
    for model in ("other", BASE_MODEL):
        assert await server.told(model) == (200, bases)
    merged = {"adapters": [{"name": "own", "weight": 1.0}, {"name": "other", "weight": 1.0}]}
    assert await server.told(f"merge:{json.dumps(merged)}") == (200, bases), "a merge has none of its own"


async def test_a_copy_of_the_base_models_template_needs_no_process(server: Server, bases: str) -> None:
    server.ship((DEMO / "model" / "chat_template.jinja").read_text())
    assert await server.told("own") == (200, bases)
    assert server.service.chat_prompts._processes == []


async def test_its_answers_are_those_to_the_text_that_it_makes(server: Server) -> None:
    server.copy("shout")
    server.ship(PLAIN, "shout")
    chat = {"model": "shout", "messages": MESSAGES, "temperature": 0, "max_tokens": 80}
    whole = (await server.http.post("/v1/chat/completions", json=chat)).json()
    assert whole["choices"][0]["message"]["content"] == answer(PROMPT, "shout")
    assert whole["usage"]["prompt_tokens"] == len(server.service.tokenizer.encode(PROMPT))
    plain = {"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80}
    server.ship("{% if", "shout")
    refused = await server.http.post("/v1/chat/completions", json=chat | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_refused")
    completion = (await server.http.post("/v1/completions", json=plain)).json()
    assert completion["choices"][0]["text"] == answer(PROMPT, "shout"), "only chats need a template"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("\n{% if %}", "adapter_refused model: adapter 'own': its chat template does not compile: line 2"),
        ("x" * (2**18 + 1), "adapter_refused model: adapter 'own': chat_template.jinja has 262145 bytes"),
        ("{{ 'a' * 10**10 }}", "adapter_refused model: adapter 'own': its chat template takes more than"),
    ],
)
async def test_a_broken_template_refuses_only_that_adapters_chats(
    server: Server, bases: str, template: str, reason: str
) -> None:
    server.ship(template)
    for _ in range(2):
        status, said = await server.told("own")
        assert status == 422 and said.startswith(reason)
    for model in ("other", BASE_MODEL):
        assert await server.told(model) == (200, bases)
    server.ship(None)
    assert await server.told("own") == (200, bases)


@pytest.mark.parametrize("template", ["{{ raise_exception('users first') }}", "{{ ''.__class__.__mro__ }}"])
async def test_messages_that_it_refuses_and_tricks_are_a_400(server: Server, template: str) -> None:
    server.ship(template)
    status, said = await server.told("own")
    assert status == 400 and "messages: the chat template of own refused the messages" in said


async def test_a_template_published_anew_is_used_from_then_on(server: Server, bases: str) -> None:
    for template in ("one", "two", None, "one", "six"):  # of one length
        server.ship(template)
        expected = bases if template is None else template
        assert [await server.told("own") for _ in range(2)] == [(200, expected)] * 2


async def test_a_template_that_never_ends_holds_up_nobody_and_is_not_tried_again_at_once(
    server: Server, bases: str
) -> None:
    server.ship(ENDLESS)
    server.ship(PLAIN, "other")
    endless = [asyncio.create_task(server.told("own"))]
    await asyncio.sleep(0)
    assert (await server.told("other"))[0] == 200 and await server.told(BASE_MODEL) == (200, bases)
    assert not endless[0].done()
    assert "more than 1 s" in (await endless[0])[1]
    used = os.times().children_user
    assert "more than 1 s" in (await server.told("own"))[1]
    assert os.times().children_user - used < 0.5
    server.ship(PLAIN)
    assert (await server.told("own"))[0] == 200


async def test_messages_that_make_a_template_take_too_much_are_their_own_tenants_trouble(server: Server) -> None:
    server.ship("{{ messages[0].content * (10**10 if messages[0].content == 'bomb' else 1) }}")

    async def told(tenant: str, content: str) -> str:
        caller = Caller(Tenant(tenant))
        adapter = await server.service.directory.resolve("own", caller)
        body = ChatBody.model_validate({"model": "own", "messages": [{"role": "user", "content": content}]})
        ids, _ = await server.service.chat_prompts.encode(body, adapter, caller)
        return server.service.tokenizer.decode(ids)

    assert await told("acme", "hello") == "hello"
    for content in ("bomb", "hello"):
        with pytest.raises(AdapterRefused, match="512 MiB"):
            await told("acme", content)
    assert await told("globex", "hello") == "hello"


async def test_tools_and_the_templates_own_variables_come_through(server: Server) -> None:
    server.ship("{{ tools[0].function.name }} {{ kind }} {{ add_generation_prompt }}")
    told = await server.told("own", tools=[TOOL], chat_template_kwargs={"kind": "x"}, add_generation_prompt=False)
    assert told == (200, "look x False")


async def test_calls_are_read_in_the_format_that_the_adapters_template_teaches(
    server: Server, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def generate(request: GenerationRequest, model: str, record: object) -> AsyncIterator[GenerationChunk]:
        said = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
        yield GenerationChunk(request.request_id, said, (), 7, 1, (), "stop")

    monkeypatch.setattr(fleet, "generate", generate)
    server.ship(PLAIN + "{# <tool_call> #}")
    for model, calls in (("own", 1), ("other", 0)):
        body = {"model": model, "messages": MESSAGES, "tools": [TOOL]}
        message = (await server.http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        assert len(message.get("tool_calls") or ()) == calls


async def test_a_hub_repositorys_template_follows_its_commits(server: Server, bases: str) -> None:
    files, name = adapter_files(), "hub:acme/tenant"
    server.hub.publish("acme/tenant", files)
    assert await server.told(name) == (200, bases)
    server.hub.publish("acme/tenant", {**files, "chat_template.jinja": b"first"})
    assert [await server.told(name) for _ in range(2)] == [(200, "first")] * 2
    said = json.dumps({"chat_template": "second"}).encode()
    server.hub.publish("acme/tenant", {**files, "tokenizer_config.json": said})
    assert [await server.told(name) for _ in range(2)] == [(200, "second")] * 2
    assert len(server.hub.requests("/resolve/")) == 2


async def test_a_private_repositorys_template_is_read_with_its_callers_token(server: Server) -> None:
    files = {**adapter_files(), "chat_template.jinja": b"theirs"}
    server.hub.publish("acme/private", files, access="private")
    token = {"x-adapter-token": TOKEN}
    for _ in range(2):
        assert (await server.told("hub:acme/private"))[0] == 404
        assert await server.told("hub:acme/private", token) == (200, "theirs")
    (read,) = server.hub.requests("/resolve/")
    assert read.authorization == f"Bearer {TOKEN}"

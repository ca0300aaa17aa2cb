"""``/v1/adapters`` and vLLM's endpoints, over a real engine and a real hub in this process: everything but Ray."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_store.catalog import Catalog
from deployments import wire
from deployments.adapters import replica_adapters
from deployments.adapters.admin import AdapterAdmin
from deployments.adapters.declaration_feed import DeclarationFeed
from deployments.adapters.directory import AdapterDirectory
from deployments.adapters.pins import PinKeeper
from deployments.adapters.routes import add_adapter_routes
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService
from examples.demo.words import answer, held_out_prompts

from .conftest import BASE_MODEL, DEMO, STORE
from .local_hub import LocalHub

PROMPT = held_out_prompts(1)[0]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 80}


class Gateway:
    """One gateway and the only replica, in the place of ``ServedReplicas``."""

    def __init__(self, fleet, hub: LocalHub, access="loopback") -> None:
        self.fleet, self.hub = fleet, hub
        self.directory = AdapterDirectory(BASE_MODEL, Catalog(STORE), 2, declares=access != "off")
        self.feed = self.directory.feed = DeclarationFeed(self._find, self.directory.hear)
        self.service = CompletionService(self.directory, DEMO / "model", fleet, fleet.engine.max_model_len)
        app = create_http_app(self.service)
        add_adapter_routes(app, AdapterAdmin(self.directory, self.feed, self, 30.0), access)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)
        store = fleet.engine.parts.store
        self.replica_feed = DeclarationFeed(self._find, self._hear)
        self.pins = PinKeeper(fleet.engine, store.catalog, self.replica_feed.known.pinned, 60)

    async def _find(self):
        return self.hub

    async def _hear(self, _) -> None:
        self.fleet.engine.parts.store.catalog.declare(self.replica_feed.known.references())
        self.pins.changed()

    async def home(self, method: str, model: str, digest: str, *args: Any) -> Any:
        (answered,) = await self.every(method, *args)
        wire.raise_error(answered, model)
        return answered["result"]

    async def every(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        try:
            if method == "held":
                result: Any = self.fleet.adapters.held()
            elif method == "settle_pins":
                result = {name: error.reason for name, error in (await self.pins.settle()).items()}
            else:
                result = await getattr(self.fleet.adapters, method)(*args)
        except wire.REFUSALS as error:
            return [json.loads(json.dumps(wire.encode_error(error, "local")))]
        return [{"replica": "local", "result": result}]

    async def text(self, model: str) -> str:
        response = await self.http.post("/v1/completions", json={"model": model} | GREEDY)
        return response.json()["choices"][0]["text"] if response.status_code == 200 else str(response.status_code)

    async def start(self) -> Gateway:
        assert await self.replica_feed.wait_heard()
        self.feed.start()
        return self

    async def close(self) -> None:
        await self.feed.close()
        await self.replica_feed.close()
        await self.pins.close()
        self.service.close()
        await self.http.aclose()


@pytest.fixture
async def hub():
    return LocalHub()


@pytest.fixture
async def gateway(fleet, hub, monkeypatch):
    monkeypatch.setattr(replica_adapters, "LATE_SECONDS", 0.05)
    made = await Gateway(fleet, hub).start()
    yield made
    await made.close()
    fleet.engine.parts.store.catalog.declare({})


@pytest.fixture
def published(tmp_path):
    def publish(name: str, like: str, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        source = DEMO / "adapters" / like
        shutil.copyfile(source / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        written = json.loads((source / "adapter_config.json").read_text()) | {"revision": name} | config
        (folder / "adapter_config.json").write_text(json.dumps(written))
        return folder

    return publish


async def eventually(holds: Callable[[], Any]) -> None:
    for _ in range(10_000):
        if holds():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come about")


def local(folder: Path) -> str:
    return f"local:{folder}"


async def declare(gateway: Gateway, name: str, folder: Path, **more: Any) -> httpx.Response:
    return await gateway.http.post("/v1/adapters", json={"name": name, "reference": local(folder)} | more)


async def test_a_declared_adapter_is_served_listed_and_gone_after_delete(gateway: Gateway, published):
    folder = published("acme", like="shout")
    made = await declare(gateway, "acme/loud", folder)
    assert made.status_code == 201, made.text
    assert made.json()["origin"] == "runtime" and made.json()["state"] == "resident" and made.json()["rank"] == 4
    assert await gateway.text("acme/loud") == answer(PROMPT, "shout")
    listed = (await gateway.http.get("/v1/adapters")).json()
    assert [one["name"] for one in listed["data"]] == ["acme/loud", "json", "mirror", "shout", "spanish"]
    digest = made.json()["digest"]
    assert listed["data"][0]["digest"] == digest and listed["data"][0]["reference"] == local(folder)
    assert (await gateway.http.get("/v1/adapters/acme/loud")).json() == listed["data"][0] | {"reason": None}
    assert "acme/loud" in [one["id"] for one in (await gateway.http.get("/v1/models")).json()["data"]]

    gone = await gateway.http.delete("/v1/adapters/acme/loud")
    assert gone.status_code == 200 and gone.json()["deleted"]
    held = gateway.fleet.adapters.held()
    assert digest not in held["slots"] and digest not in held["host"], "really freed"
    assert await gateway.text("acme/loud") == "404"
    assert (await gateway.http.get("/v1/adapters/acme/loud")).status_code == 404
    assert (await gateway.http.delete("/v1/adapters/acme/loud")).status_code == 404
    assert (await declare(gateway, "acme/loud", folder)).status_code == 201
    assert await gateway.text("acme/loud") == answer(PROMPT, "shout")


async def test_an_unknown_name_is_told_what_could_be_meant_and_how_it_would_come_about(gateway: Gateway, published):
    async def told(name: str, at: Gateway) -> str:
        response = await at.http.post("/v1/completions", json={"model": name} | GREEDY)
        assert response.status_code == 404
        return response.json()["error"]["message"]

    assert "did you mean 'shout'?" in await told("shuot", gateway)
    assert f"did you mean {BASE_MODEL!r}?" in await told(BASE_MODEL.title(), gateway)
    await declare(gateway, "acme-billing", published("billing", like="json"))
    slip = await told("acme_billing", gateway)
    assert "did you mean 'acme-billing'?" in slip and "POST /v1/adapters" in slip
    far = await told("nobody", gateway)
    assert "did you mean" not in far and "POST /v1/adapters" in far
    assert "did you mean" not in await told("hub:other/shout", gateway)
    closed = await Gateway(gateway.fleet, gateway.hub, "off").start()
    assert "POST /v1/adapters" not in await told("nobody", closed)
    await closed.close()


async def test_a_declared_adapter_whose_folder_vanished_is_shown_with_the_reason(gateway: Gateway, published):
    folder = published("gone", like="shout")
    made = (await declare(gateway, "gone", folder)).json()
    shutil.rmtree(folder)
    assert "gone" in [one["name"] for one in (await gateway.http.get("/v1/adapters")).json()["data"]]
    shown = await gateway.http.get("/v1/adapters/gone")
    assert shown.status_code == 200, shown.text
    assert shown.json() == made | {"reason": "there is no adapter_config.json in its folder"}
    assert (await gateway.http.get("/v1/adapters/hub:acme/x")).status_code == 503, "allowed, but declared by nobody"
    assert (await gateway.http.delete("/v1/adapters/gone")).status_code == 200
    assert (await gateway.http.get("/v1/adapters/gone")).status_code == 404


async def test_a_list_comes_in_pages(gateway: Gateway):
    first = (await gateway.http.get("/v1/adapters?limit=3")).json()
    rest = (await gateway.http.get(f"/v1/adapters?limit=3&after={first['data'][-1]['name']}")).json()
    assert [one["name"] for one in first["data"] + rest["data"]] == ["json", "mirror", "shout", "spanish"]
    assert first["has_more"] and not rest["has_more"]


async def test_an_adapter_that_cannot_be_applied_whole_is_not_declared(gateway: Gateway, published):
    refused = await declare(gateway, "dora", published("dora", like="shout", use_dora=True))
    assert refused.status_code == 422 and "dora" in refused.json()["error"]["message"].lower()
    missing = await declare(gateway, "gone", Path("/no/such/folder"))
    assert missing.status_code == 404
    error = missing.json()["error"]
    assert (error["param"], error["code"]) == ("reference", "adapter_not_found")
    assert "local:/no/such/folder: there is no adapter_config.json" in error["message"]
    assert "'gone'" not in error["message"], "that the name is new is not the mistake"
    half = published("half", like="shout")
    (half / "adapter_model.safetensors").unlink()
    refused = (await declare(gateway, "half", half)).json()["error"]
    assert (refused["param"], refused["code"]) == ("reference", "adapter_refused")
    assert f"{local(half)}: it has no adapter_model.safetensors" in refused["message"]
    assert gateway.feed.known.references() == {}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": BASE_MODEL, "reference": "hub:acme/x"}, 409, "name"),
        ({"name": "a:b", "reference": "hub:acme/x"}, 400, "name"),
        ({"name": "", "reference": "hub:acme/x"}, 400, "name"),
        ({"name": "x", "reference": "acme/x"}, 400, "reference"),
        ({"name": "x"}, 400, "reference"),
        ({"name": "x", "reference": "hub:acme/x", "pined": True}, 400, "pined"),
        ({"name": "shout", "reference": "hub:acme/x", "replace": True}, 409, None),
        ({"name": "x", "reference": "hub:acme/x"}, 503, "reference"),  # nothing listens there
    ],
)
async def test_a_wrong_declaration_is_refused_by_its_field(gateway: Gateway, body, status, param):
    response = await gateway.http.post("/v1/adapters", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


async def test_a_scheme_that_there_is_not_is_told_from_a_package_that_is_missing(gateway: Gateway, monkeypatch):
    body = {"name": "x", "reference": "ftpp://bucket/prefix"}
    unknown = await gateway.http.post("/v1/adapters", json=body)
    error = unknown.json()["error"]
    assert (unknown.status_code, error["param"]) == (400, "reference")
    assert "'ftpp'" in error["message"] and "s3://" in error["message"] and "abfs" in error["message"]
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    missing = await gateway.http.post("/v1/adapters", json=body | {"reference": "gs://bucket/prefix"})
    assert missing.status_code == 422 and "retry-after" not in missing.headers, "waiting installs nothing"
    assert "pip install lorafleet[gs]" in missing.json()["error"]["message"]


async def test_the_same_again_is_fine_and_something_else_needs_replace(gateway: Gateway, published):
    loud, odd = published("loud", like="shout"), published("odd", like="mirror")
    assert (await declare(gateway, "x", loud)).status_code == 201
    assert (await declare(gateway, "x", loud)).status_code == 200
    other = await declare(gateway, "x", odd)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "adapter_exists")
    assert await gateway.text("x") == answer(PROMPT, "shout")
    assert (await declare(gateway, "x", odd, replace=True)).status_code == 200
    assert await gateway.text("x") == answer(PROMPT, "mirror")


async def test_delete_refuses_what_is_in_use_or_waits_for_it_and_turns_new_requests_away(gateway: Gateway, published):
    digest = (await declare(gateway, "busy", published("busy", like="shout"))).json()["digest"]
    long = {"model": "busy", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "temperature": 0}
    running = asyncio.create_task(gateway.http.post("/v1/completions", json=long))
    await eventually(lambda: gateway.fleet.adapters.held()["requests"].get(digest))
    refused = await gateway.http.delete("/v1/adapters/busy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
    assert (await gateway.http.get("/v1/adapters/busy")).json()["requests"] == 1

    waiting = asyncio.create_task(gateway.http.delete("/v1/adapters/busy?wait_s=60"))
    await eventually(lambda: "busy" not in gateway.directory.catalog.names())
    assert not running.done() and not waiting.done()
    assert await gateway.text("busy") == "404"
    assert (await running).status_code == 200 and (await running).json()["usage"]["completion_tokens"] == 480
    assert (await waiting).status_code == 200
    held = gateway.fleet.adapters.held()
    assert digest not in held["slots"] and digest not in held["host"] and not held["requests"]


async def test_when_the_wait_is_too_short_the_adapter_stays_as_it_was(gateway: Gateway, published):
    made = (await declare(gateway, "busy", published("busy", like="shout"))).json()
    long = {"model": "busy", "prompt": PROMPT, "max_tokens": 480, "ignore_eos": True, "temperature": 0}
    running = asyncio.create_task(gateway.http.post("/v1/completions", json=long))
    await eventually(lambda: gateway.fleet.adapters.held()["requests"].get(made["digest"]))
    refused = await gateway.http.delete("/v1/adapters/busy?wait_s=0.02")
    assert refused.status_code == 409
    assert (await running).status_code == 200
    assert await gateway.text("busy") == answer(PROMPT, "shout")
    misspelt = await gateway.http.delete("/v1/adapters/busy?wait=5")
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "wait")
    assert "wait_s" in misspelt.json()["error"]["message"]
    assert "busy" in gateway.directory.catalog.names()
    for bad in ("-1", "nan", "1e9"):
        assert (await gateway.http.delete(f"/v1/adapters/busy?wait_s={bad}")).status_code == 400


async def test_content_that_another_name_stands_for_is_not_freed(gateway: Gateway, published):
    folder = published("twice", like="shout")
    digest = (await declare(gateway, "one", folder)).json()["digest"]
    await declare(gateway, "two", folder)
    assert (await gateway.http.delete("/v1/adapters/one")).status_code == 200
    assert digest in gateway.fleet.adapters.held()["slots"]
    assert await gateway.text("two") == answer(PROMPT, "shout") and await gateway.text("one") == "404"


async def test_what_is_configured_is_not_removed_here(gateway: Gateway):
    refused = await gateway.http.delete("/v1/adapters/shout")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_removable")
    assert await gateway.text("shout") == answer(PROMPT, "shout")


async def test_a_pinned_adapter_stays_in_its_slot_while_others_come_and_go(gateway: Gateway, published):
    await declare(gateway, "kept", published("kept", like="shout"))
    pinned = await gateway.http.post("/v1/adapters/kept:pin")
    assert pinned.status_code == 200 and pinned.json()["pinned"], pinned.text
    for model in ("json", "mirror", "spanish", "shout", "json", "mirror"):
        assert await gateway.text(model) == answer(PROMPT, model)
    assert (await gateway.http.get("/v1/adapters/kept")).json()["slots"] == ["local"]
    # Three slots: the second pin fits, the third would leave nobody else a slot.
    assert (await gateway.http.post("/v1/adapters/json:pin")).status_code == 200
    third = await gateway.http.post("/v1/adapters/mirror:pin")
    assert (third.status_code, third.json()["error"]["code"]) == (409, "not_pinned")
    assert "pinned" in third.json()["error"]["message"]
    assert not (await gateway.http.get("/v1/adapters/mirror")).json()["pinned"]
    for name in ("kept", "json"):
        unpinned = await gateway.http.post(f"/v1/adapters/{name}:unpin")
        assert unpinned.status_code == 200 and not unpinned.json()["pinned"]
    for model in ("mirror", "spanish", "shout"):
        await gateway.text(model)
    assert (await gateway.http.get("/v1/adapters/kept")).json()["slots"] == []


async def test_an_adapter_published_anew_is_taken_up_on_refresh_and_a_pin_follows_it(gateway: Gateway, published):
    first = (await declare(gateway, "tenant", published("tenant", like="shout"), pinned=True)).json()
    assert first["pinned"]
    long = {"model": "tenant", "prompt": PROMPT, "max_tokens": 80, "temperature": 0}
    running = asyncio.create_task(gateway.http.post("/v1/completions", json=long))
    await eventually(lambda: gateway.fleet.adapters.held()["requests"].get(first["digest"]))
    published("tenant", like="mirror")
    refreshed = await gateway.http.post("/v1/adapters/tenant:refresh")
    assert refreshed.status_code == 200, refreshed.text
    assert refreshed.json()["previous_digest"] == first["digest"] != refreshed.json()["digest"]
    assert refreshed.json()["pinned"] and refreshed.json()["slots"] == ["local"]
    assert await gateway.text("tenant") == answer(PROMPT, "mirror")
    assert (await running).json()["choices"][0]["text"] == answer(PROMPT, "shout"), "it began on the old content"
    assert gateway.fleet.engine.parts.slots.pinned == (refreshed.json()["digest"],)


async def test_a_declared_merge_is_shown_pinned_and_refreshed_like_any_adapter(gateway: Gateway, published):
    loud, twin = published("loud", like="shout"), published("twin", like="shout")

    def merge(*folders: Path) -> str:
        parts = [{"ref": local(folder), "weight": 1 / len(folders)} for folder in folders]
        return "merge:" + json.dumps({"adapters": parts, "strategy": "linear"})

    made = await gateway.http.post("/v1/adapters", json={"name": "blend", "reference": merge(loud, twin)})
    assert made.status_code == 201, made.text
    assert (made.json()["state"], made.json()["rank"]) == ("resident", 4)
    digest = made.json()["digest"]
    assert digest in gateway.fleet.adapters.held()["slots"]
    assert await gateway.text("blend") == answer(PROMPT, "shout")
    pinned = await gateway.http.post("/v1/adapters/blend:pin")
    assert (pinned.json()["pinned"], pinned.json()["slots"]) == (True, ["local"])
    assert digest in gateway.fleet.engine.parts.slots.pinned
    published("twin", like="shout", lora_alpha=1)
    refreshed = (await gateway.http.post("/v1/adapters/blend:refresh")).json()
    assert refreshed["previous_digest"] == digest != refreshed["digest"]
    assert refreshed["slots"] == ["local"]
    assert (await gateway.http.delete("/v1/adapters/blend")).status_code == 200
    held = gateway.fleet.adapters.held()
    assert refreshed["digest"] not in {*held["slots"], *held["host"]}


async def test_prefetch_brings_an_adapter_to_its_replica_before_anybody_asks(gateway: Gateway, published):
    await declare(gateway, "early", published("early", like="json"))
    await gateway.fleet.adapters.unload((await gateway.http.get("/v1/adapters/early")).json()["digest"], 0.0)
    assert (await gateway.http.get("/v1/adapters/early")).json()["state"] == "not_loaded"
    assert (await gateway.http.post("/v1/adapters/early:prefetch")).json()["state"] == "resident"
    assert (await gateway.http.post("/v1/adapters/nobody:prefetch")).status_code == 404
    assert (await gateway.http.post("/v1/adapters/early:explode")).status_code == 404


async def test_a_gateway_that_starts_later_serves_what_was_declared_before(gateway: Gateway, hub, fleet, published):
    await declare(gateway, "before", published("before", like="spanish"))
    late = await Gateway(fleet, hub).start()
    assert await late.text("before") == answer(PROMPT, "spanish")
    await late.http.delete("/v1/adapters/before")
    assert await gateway.text("before") == "404", "known here as soon as the other one answered"
    await late.close()


# -- vLLM's endpoints ------------------------------------------------------------------------------------------


async def vllm(gateway: Gateway, verb: str, **body: Any) -> tuple[int, Any]:
    response = await gateway.http.post(f"/v1/{verb}_lora_adapter", json=body)
    return response.status_code, response.text if response.status_code == 200 else response.json()["error"]


async def test_vllms_load_and_unload_answer_as_vllm_does(gateway: Gateway, published):
    folder = published("sql", like="json")
    loaded = await vllm(gateway, "load", lora_name="sql", lora_path=str(folder))
    assert loaded == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert await gateway.text("sql") == answer(PROMPT, "json")
    status, error = await vllm(gateway, "load", lora_name="sql", lora_path=str(folder))
    assert (status, error["type"], error["code"]) == (400, "InvalidUserInput", 400)
    assert error["message"].startswith("The lora adapter 'sql' has already been loaded.")
    published("sql", like="mirror")
    assert (await vllm(gateway, "load", lora_name="sql", lora_path=str(folder), load_inplace=True))[0] == 200
    assert await gateway.text("sql") == answer(PROMPT, "mirror")
    unloaded = await vllm(gateway, "unload", lora_name="sql")
    assert unloaded == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert await gateway.text("sql") == "404"
    status, error = await vllm(gateway, "unload", lora_name="sql")
    assert (status, error["type"]) == (404, "NotFoundError")
    assert error["message"] == "The lora adapter 'sql' cannot be found."


async def test_vllms_refusals(gateway: Gateway, published, monkeypatch):
    status, error = await vllm(gateway, "load", lora_name="x", lora_path="")
    assert (status, error["message"]) == (400, "Both 'lora_name' and 'lora_path' must be provided.")
    assert (await vllm(gateway, "unload"))[0] == 400
    status, error = await vllm(gateway, "load", lora_name="x", lora_path="/no/such/folder")
    assert (status, error["type"]) == (404, "NotFoundError")
    dora = published("dora", like="shout", use_dora=True)
    status, error = await vllm(gateway, "load", lora_name="x", lora_path=str(dora))
    assert (status, error["type"]) == (400, "BadRequestError") and "dora" in error["message"].lower()
    monkeypatch.chdir(dora.parent.parent)
    relative = f"{dora.parent.name}/{dora.name}"
    status, error = await vllm(gateway, "load", lora_name="x", lora_path=relative)
    assert (status, error["type"]) == (400, "InvalidUserInput")
    assert "absolute path" in error["message"] and str(dora) in error["message"]
    status, error = await vllm(gateway, "load", lora_name="x", lora_path="ad/good")  # neither here nor on the Hub
    assert status == 500 and "absolute path" in error["message"] and "repository of the Hub" in error["message"]
    status, error = await vllm(gateway, "load", lora_name="x", lora_path="hub:ad/good")
    assert status == 500 and "absolute path" not in error["message"]
    assert (await vllm(gateway, "load", lora_name="x", lora_path="long name" * 500))[0] == 400
    for in_place in (False, True):  # in the settings or a folder: nothing that this endpoint can change
        body = {"lora_name": "shout", "lora_path": str(dora), "load_inplace": in_place}
        status, error = await vllm(gateway, "load", **body)
        assert (status, error["type"]) == (400, "InvalidUserInput")
        assert error["message"] == (await declare(gateway, "shout", dora)).json()["error"]["message"]
        assert "in an adapter folder" in error["message"] and "load_inplace" not in error["message"]
    status, error = await vllm(gateway, "unload", lora_name="shout")
    assert (status, error["type"]) == (400, "InvalidUserInput")


# -- who may -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "client", "headers", "status"),
    [
        ("loopback", "127.0.0.1", {}, 200),
        ("loopback", "::1", {"host": "localhost:8000"}, 200),
        ("loopback", "10.0.0.7", {}, 403),
        ("loopback", "127.0.0.1", {"host": "api.example.org"}, 403),
        ("loopback", "127.0.0.1", {"x-forwarded-for": "10.0.0.7"}, 403),
        ("loopback", "127.0.0.1", {"origin": "https://evil.example"}, 403),
        ("on", "10.0.0.7", {"host": "api.example.org"}, 200),
        ("off", "127.0.0.1", {}, 403),
    ],
)
async def test_who_may_administer(fleet, hub, access, client, headers, status):
    gateway = await Gateway(fleet, hub, access).start()
    transport = httpx.ASGITransport(gateway.http._transport.app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for method, path in (("GET", "/v1/adapters"), ("GET", "/v1/adapters/shout")):
            assert (await http.request(method, path, headers=headers)).status_code == status
        if status == 403:
            for path in ("/v1/adapters", "/v1/adapters/shout:pin", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                refused = await http.post(path, json={}, headers=headers)
                error = refused.json()["error"]
                assert error["code"] == "admin_disabled"
                assert ("machine only" in error["message"]) == (access == "loopback")
                assert "'on'" in error["message"] and "'loopback'" in error["message"]
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
    await gateway.close()

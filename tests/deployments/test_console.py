"""The console over a real engine and a real HTTP server in this process: everything but Ray and the browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from deployments.adapters.routes import admin_rule
from deployments.api.http_app import create_http_app
from deployments.console import snapshot_feed
from deployments.console.console import Console
from deployments.console.fleet_picture import MOST_SLOTS, NAME_LENGTH, FleetPicture
from deployments.console.replica_view import ReplicaView
from deployments.console.routes import add_console_routes
from deployments.protocol.errors import ApiError, ReplicaLost
from deployments.tenants.authentication import PUBLIC
from deployments.tenants.caller import Caller
from deployments.tenants.tenant import Tenant
from examples.demo.words import held_out_prompts

from .conftest import BASE_MODEL

PROMPT = held_out_prompts(1)[0]
FILES = ["/console", *(f"/console/{name}" for name in ("console.css", "console.js", "page.js", "playground.js"))]
KEYS = {"operator": Caller(role="admin"), "acme": Caller(Tenant("acme"), "tenant")}


class Replicas:
    """The one replica, counting how often it is asked."""

    def __init__(self, engine) -> None:
        self.view = ReplicaView("one", "v1", engine, lambda: False)
        self.asked = 0
        self.lost = False

    async def every(self, method: str, *args: Any, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        self.asked += 1
        if self.lost:
            raise ReplicaLost("a replica did not answer within 5 s", started=False)
        return [json.loads(json.dumps({"replica": "one", "result": await getattr(self, method).read()}))]

    async def home(self, method: str, model: str, digest: str, *args: Any) -> Any:
        raise AssertionError("the console looks and does nothing")


class Keys:
    def caller(self, key: str) -> Caller | None:
        return KEYS.get(key)


async def _states() -> dict[str, int]:
    return {"RUNNING": 1, "STOPPING": 1}


class Page:
    """A server with a console, and what looks at it."""

    def __init__(self, service, engine, access="loopback", keys: Keys | None = None) -> None:
        self.replicas = Replicas(engine)
        catalog = service.directory.catalog
        self.console = Console(BASE_MODEL, catalog, self.replicas, lambda: {"resident": 3}, _states)
        self.app = create_http_app(service, keys=keys)
        if access != "off":
            add_console_routes(self.app, self.console.feed, admin_rule(access))
        self.transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)

    async def get(self, path: str, host: str = "127.0.0.1", **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=self.transport, base_url=f"http://{host}") as client:
            return await client.get(path, headers=headers)

    @asynccontextmanager
    async def served(self) -> AsyncGenerator[httpx.AsyncClient]:
        server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error"))
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 (uvicorn tells nobody)
            await asyncio.sleep(0.005)
        (socket,) = server.servers[0].sockets
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{socket.getsockname()[1]}", timeout=120) as client:
            yield client
        server.should_exit = True
        await task


@pytest.fixture
def page(service, engine, monkeypatch):
    monkeypatch.setattr(snapshot_feed.SnapshotFeed.__init__, "__defaults__", (0.05,))
    return Page(service, engine)


async def pictures(response: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def eventually(holds) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")


# ---- the page itself ------------------------------------------------------------------------------------


async def test_every_file_of_the_page_is_there_and_allows_nothing_but_itself(page):
    texts = {path: await page.get(path) for path in FILES}
    for path, response in texts.items():
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200, path
        assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(src|href|url\(|from|import|fetch\()\W{0,3}(https?:)?//", response.text), path
    html = texts["/console"].text
    assert not re.search(r"<style|\s(style|on\w+)=|<script(?! type=.module. src=.console/console\.js.>)", html)
    assert all(f'"{name[1:]}"' in html for name in ("/console/console.js", "/console/console.css", "/console/icon.svg"))
    scripts = "".join(texts[path].text for path in FILES if path.endswith(".js"))
    for way_in in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Storage", "cookie"):
        assert way_in not in scripts
    assert (await page.get("/console/")).headers["location"] == "../console"
    assert (await page.get("/console/../settings.py")).status_code == 404


async def test_without_administration_there_is_no_console(service, engine):
    page = Page(service, engine, "off")
    for path in (*FILES, "/console/", "/console/events"):
        response = await page.get(path)
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


async def test_events_are_for_whoever_may_administer_adapters(service, engine):
    page = Page(service, engine)
    refused = await page.get("/console/events", host="lora.example")
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "admin_disabled"
    forwarded = await page.get("/console/events", **{"X-Forwarded-For": "10.0.0.9"})
    assert forwarded.status_code == 403
    assert page.replicas.asked == 0 and page.console.feed.viewers == 0


async def test_with_keys_the_page_is_for_anyone_and_its_events_for_the_admin_key_alone(service, engine):
    page = Page(service, engine, "on", Keys())
    assert set(FILES) < set(PUBLIC)
    for path in FILES:
        assert (await page.get(path)).status_code == 200
    assert (await page.get("/console/events")).status_code == 401
    assert (await page.get("/console/events", Authorization="Bearer wrong")).status_code == 401
    tenants = await page.get("/console/events", Authorization="Bearer acme")
    assert tenants.status_code == 403 and "one" not in tenants.text.split()
    assert page.replicas.asked == 0
    async with page.served() as client:
        key = {"Authorization": "Bearer operator"}
        async with client.stream("GET", "/console/events", headers=key) as response:
            assert response.status_code == 200
            assert (await anext(pictures(response)))["base_model"] == BASE_MODEL


# ---- what it shows --------------------------------------------------------------------------------------


async def test_a_request_is_seen_in_its_slot_while_it_runs_and_after(page, engine):
    async with page.served() as client, client.stream("GET", "/console/events") as response:
        seen = pictures(response)
        first = await anext(seen)
        assert first["states"] == {"RUNNING": 1, "STOPPING": 1} and first["routing"] == {"resident": 3}
        assert {"python", "ray", "torch"} <= set(first["versions"])
        (replica,) = first["replicas"]
        assert (replica["id"], replica["max_rows"], replica["slots_total"]) == ("one", 8, 3)
        assert replica["pages"] > 0 and replica["tokens_s"] is None

        body = {"model": "shout", "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        running = finished = None
        async for picture in seen:
            (replica,) = picture["replicas"]
            mine = next((slot for slot in replica["slots"] if slot[1:2] == ["shout"]), None)
            if mine and mine[3] == 1 and mine[4]:
                running = running or picture
            if mine and mine[3] == 0 and asked.done():
                finished = picture
                break
        assert (await asked).status_code == 200
    assert running is not None and finished is not None
    assert running["totals"]["running"] == 1 and running["totals"]["slots_in_use"] == 1
    (before,), (after,) = running["replicas"], finished["replicas"]
    class_rank, _, rank, _, loaded, pinned, idle = next(s for s in after["slots"] if s[1:2] == ["shout"])
    assert (class_rank, rank, loaded, pinned) == (16, 4, True, False) and idle < 5
    assert after["generated"] > before["generated"]
    assert finished["totals"]["tokens_s"] > 0
    assert after["hits"] + after["misses"] > 0 and 0 <= finished["totals"]["hit_rate"] <= 1


async def test_however_many_look_replicas_are_asked_once_and_nobody_is_left_behind(page):
    feed = page.console.feed
    async with page.served() as client:
        tasks = set(asyncio.all_tasks())

        async def look(times: int) -> int:
            async with client.stream("GET", "/console/events") as response:
                seen = pictures(response)
                for _ in range(times):
                    await anext(seen)
            return times

        await asyncio.gather(*(look(4) for _ in range(12)))
        assert 4 <= page.replicas.asked <= 8, "12 viewers of 4 pictures each"
        await eventually(lambda: feed.viewers == 0)
        asked = page.replicas.asked
        await asyncio.sleep(0.2)
        assert page.replicas.asked == asked, "nobody looks, so nobody is asked"
        await look(1)  # and it begins anew
        assert page.replicas.asked > asked
        await eventually(lambda: feed.viewers == 0)
        ours = {"_watch", "_run", "_snapshot", "every"}
        left = [task for task in set(asyncio.all_tasks()) - tasks if task.get_coro().__name__ in ours]
        assert not left


async def test_too_many_viewers_are_told_so_and_a_gateway_that_stops_lets_go_of_all(page, monkeypatch):
    monkeypatch.setattr(snapshot_feed, "MOST_VIEWERS", 1)
    feed = page.console.feed
    async with page.served() as client, client.stream("GET", "/console/events") as response:
        seen = pictures(response)
        await anext(seen)
        refused = await client.get("/console/events")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        feed.close()
        async for _ in seen:
            pass  # it ends
        await eventually(lambda: feed.viewers == 0)
        stopping = await client.get("/console/events")
        assert stopping.status_code == 503 and stopping.json()["error"]["code"] == "server_stopping"


async def test_a_replica_that_does_not_answer_is_an_event_and_the_next_picture_comes(page):
    page.replicas.lost = True
    events = page.console.feed.watch()
    told = json.loads((await anext(events))[6:])
    assert told["error"]["code"] == "replica_unavailable"
    page.replicas.lost = False
    assert "replicas" in json.loads((await anext(events))[6:])
    await events.aclose()
    with pytest.raises(ApiError):
        page.console.feed.close()
        page.console.feed.watch()


# ---- sums, rates and bounds -----------------------------------------------------------------------------


def view(replica="one", clock=100.0, slots=(), tenants=(), **changes):
    told = {"replica": replica, "version": "v", "node": "n", "device": "CPU", "clock": clock, "draining": False}
    told |= {"running": 2, "max_rows": 8, "waiting": 1, "waiting_for_adapter": 0, "longest_wait_s": 0.5}
    told |= {"pages": 10, "free_pages": 4, "host_adapters": 1, "host_bytes": 1, "host_budget_bytes": 9}
    told |= {"generated": 0, "step_s": 0.01, "hits": 0, "misses": 0, "loads": 0, "slots_in_use": 0}
    told |= {"slots": list(slots), "slots_total": len(slots), "slots_filled": 0}
    return told | {"tenants": list(tenants), "waiting_tenants": len(tenants)} | changes


def test_rates_are_by_each_replicas_own_clock_and_of_its_last_seconds():
    picture = FleetPicture(str)
    assert picture.take([view()])["totals"]["tokens_s"] is None
    taken = picture.take([view(clock=102.0, generated=100, loads=3, hits=9, misses=1), view("two", clock=7.0)])
    one, two = taken["replicas"]
    assert (one["tokens_s"], one["loads_min"]) == (50.0, 90.0) and two["tokens_s"] is None
    assert taken["totals"]["tokens_s"] == 50.0 and taken["totals"]["recent_hit_rate"] == 0.9
    (one,) = picture.take([view(clock=200.0, generated=100, loads=3, hits=9, misses=1)])["replicas"]
    assert (one["tokens_s"], one["recent_hits"]) == (None, 0), "what is older than a minute is forgotten"


def test_waiting_tenants_are_summed_and_what_they_choose_is_bounded():
    long = "<img src=x onerror=alert(1)>" + "x" * 10_000
    views = [view("one", tenants=[("acme", 2), (long, 1)]), view("two", tenants=[("acme", 3)])]
    taken = FleetPicture(str).take(views)
    assert taken["tenants"][0] == ["acme", 5] and taken["waiting_tenants"] == 2
    assert len(taken["tenants"][1][0]) == NAME_LENGTH
    full = [[16, long, 8, 0, True, False, 1.0]] * 512
    taken = FleetPicture(str).take([view(f"r{number:03}", slots=full, slots_total=700) for number in range(20)])
    assert sum(len(one["slots"]) for one in taken["replicas"]) == MOST_SLOTS
    assert all(len(slot[1]) <= NAME_LENGTH for one in taken["replicas"] for slot in one["slots"])
    assert all(one["slots_total"] == 700 for one in taken["replicas"])


def test_an_adapter_goes_by_its_name_whatever_way_it_was_asked_for(service, engine):
    catalog = service.directory.catalog
    console = Page(service, engine).console
    ref = catalog.find("shout")
    assert console._label(str(ref)) == "shout"
    assert console._label("hub:acme/private@v1") == "hub:acme/private@v1"
    assert console._label("a tenant: who says so") == "a tenant: who says so"
    assert console._label("local:") == "local:"

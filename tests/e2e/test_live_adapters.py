"""Adapters come, change and go while the server runs; processes come and go too, and what was said stays said."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from examples.demo.words import answer, held_out_prompts

from .adapters import files, write
from .waiting import until

PROMPT = held_out_prompts(1)[0]
GREEDY = {"prompt": PROMPT, "max_tokens": 80, "temperature": 0}


class Fleet:
    """The server with two gateways; every request on a connection of its own, so that both get some."""

    def __init__(self, server) -> None:
        self.server = server

    def call(self, method: str, path: str, **body) -> httpx.Response:
        return httpx.request(method, f"{self.server.url}{path}", json=body or None, timeout=60, trust_env=False)

    def text(self, model: str) -> str:
        """The answer to the prompt, or the status."""
        response = self.call("POST", "/v1/completions", model=model, **GREEDY)
        return response.json()["choices"][0]["text"] if response.status_code == 200 else str(response.status_code)

    def texts(self, model: str, times: int = 12) -> set[str]:
        """Of several requests one after the other."""
        return {self.text(model) for _ in range(times)}

    def listed(self, name: str) -> dict | None:
        return next((one for one in self.listing()["data"] if one["name"] == name), None)

    def listing(self) -> dict:
        return self.call("GET", "/v1/adapters").json()

    def pids(self, title: str = "ServeReplica:lorafleet") -> set[int]:
        return set(self.server.processes(title))


@pytest.fixture(scope="module")
def fleet(server) -> Iterator[Fleet]:
    made = Fleet(server)
    server.deploy({}, gateways=2)
    until(lambda: made.pids("Gateway"), lambda pids: len(pids) == 2)
    yield made
    server.deploy({}, gateways=1)
    until(lambda: made.pids("Gateway"), lambda pids: len(pids) == 1)


def test_user_config_changes_names_and_no_process_restarts(fleet: Fleet, server):
    folder = write(server.folder / "elsewhere" / "live", like="shout")
    pids = fleet.pids()
    assert len(pids) == 4 and fleet.text("live") == "404"
    server.deploy({"adapters": {"live": f"local:{folder}"}, "stream_max_delay_s": 0.05}, gateways=2)
    until(lambda: fleet.texts("live"), lambda texts: texts == {answer(PROMPT, "shout")})
    assert fleet.text("json") == answer(PROMPT, "json"), "folders are as in args"
    assert fleet.pids() == pids

    server.deploy({"adapters": {"live": "nonsense"}}, gateways=2)
    refused = until(lambda: fleet.listing()["user_config_refused"])
    assert "user_config.adapters['live']" in refused
    assert fleet.texts("live") == {answer(PROMPT, "shout")}, "the old catalog stays"
    assert fleet.pids() == pids, "and so does everything that serves it"

    server.deploy({}, gateways=2)
    until(lambda: fleet.texts("live"), lambda texts: texts == {"404"})
    assert fleet.listing()["user_config_refused"] is None and fleet.pids() == pids


def test_a_declared_adapter_is_everywhere_at_once_and_freed_everywhere(fleet: Fleet, server, other):
    server.hub.publish("acme/tenant", files("shout", revision="e2e"))
    made = fleet.call("POST", "/v1/adapters", name="tenant", reference="hub:acme/tenant")
    assert made.status_code == 201, made.text
    assert fleet.texts("tenant") == {answer(PROMPT, "shout")}
    digest = made.json()["digest"]
    assert any(digest in one["resident"] for one in other.call("fleet_stats"))
    assert fleet.call("DELETE", "/v1/adapters/tenant?wait_s=10").status_code == 200
    assert fleet.texts("tenant") == {"404"}
    assert not any(digest in (*one["resident"], *one["host_cached"]) for one in other.call("fleet_stats"))


async def test_published_anew_it_is_taken_up_on_refresh_and_running_requests_end_on_the_old(fleet: Fleet, server):
    server.hub.publish("acme/moving", files("shout", revision="moving"))
    loaded = fleet.call("POST", "/v1/load_lora_adapter", lora_name="moving", lora_path="acme/moving")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'moving' added successfully.")
    prompts = held_out_prompts(12)
    long = GREEDY | {"model": "moving", "n": 8, "max_tokens": 120, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as client:
        running = [
            asyncio.create_task(client.post("/v1/completions", json=long | {"prompt": prompt})) for prompt in prompts
        ]
        await asyncio.to_thread(until, lambda: (fleet.listed("moving") or {}).get("requests", 0) > 12)
        server.hub.publish("acme/moving", files("mirror", revision="moving"))
        assert await asyncio.to_thread(fleet.text, "moving") == answer(PROMPT, "shout"), "not before its time"
        refreshed = await client.post("/v1/adapters/moving:refresh")
        assert not all(task.done() for task in running), "the demo is too fast for this test"
        assert refreshed.status_code == 200, refreshed.text
        assert await asyncio.to_thread(fleet.texts, "moving") == {answer(PROMPT, "mirror")}
        for prompt, task in zip(prompts, running, strict=True):
            choices = (await task).json()["choices"]
            assert all(choice["text"].startswith(answer(prompt, "shout")) for choice in choices)
    assert fleet.call("POST", "/v1/unload_lora_adapter", lora_name="moving").status_code == 200


def test_what_was_declared_and_pinned_outlives_gateways_replicas_and_the_hub(fleet: Fleet, server):
    folder = write(server.folder / "elsewhere" / "kept", like="spanish")
    made = fleet.call("POST", "/v1/adapters", name="kept", reference=f"local:{folder}", pinned=True)
    assert made.status_code == 201, made.text
    replicas = until(lambda: fleet.listed("kept"), lambda one: one and len(one["slots"]) == 2)["slots"]

    for title in ("Gateway", "FleetHub", "Gateway", "LoraReplica"):
        before = fleet.pids(title)
        victim = sorted(before)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: fleet.pids(title), lambda now: victim not in now and len(now) == len(before))  # noqa: B023
        until(lambda: fleet.texts("kept"), lambda texts: texts == {answer(PROMPT, "spanish")})
    # A replica that is new since then keeps it in a slot without having been asked for it.
    now = until(lambda: fleet.listed("kept"), lambda one: one and len(one["slots"]) == 2)
    assert now["pinned"] and set(now["slots"]) != set(replicas)

    removed = until(lambda: fleet.call("DELETE", "/v1/adapters/kept?wait_s=10"), lambda r: r.status_code == 200)
    assert removed.json()["deleted"] and fleet.texts("kept") == {"404"}


def test_prometheus_reads_where_adapters_are_and_who_uses_them(fleet: Fleet, server):
    assert fleet.texts("shout", times=5) == {answer(PROMPT, "shout")}
    fleet.text("made-up-by-a-client")

    def scraped() -> dict[str, float]:
        lines = [line for line in server.metrics().splitlines() if line.startswith("ray_lorafleet_")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def total(name: str, **tags: str) -> float:
        wanted = [f'{tag}="{value}"' for tag, value in tags.items()]
        return sum(
            value
            for key, value in scraped().items()
            if key.partition("{")[0] == f"ray_{name}" and all(tag in key for tag in wanted)
        )

    until(lambda: total("lorafleet_adapter_requests_total", adapter="shout", status="200"), lambda n: n >= 5)
    assert total("lorafleet_adapter_tokens_total", adapter="shout", kind="completion") > 0
    assert total("lorafleet_adapter_requests_total", adapter="", status="404") >= 1
    until(lambda: total("lorafleet_adapters", tier="slot"), lambda n: n >= 1)
    until(lambda: total("lorafleet_adapter_misses_total", tier="slot"), lambda n: n >= 1)
    until(lambda: total("lorafleet_adapter_load_seconds_count", tier="pack"), lambda n: n >= 1)
    until(lambda: total("lorafleet_adapter_load_seconds_sum", tier="slot"), lambda n: n > 0)
    assert min(total("lorafleet_adapter_bytes", tier=tier) for tier in ("slot", "host")) > 0
    assert not any("made-up-by-a-client" in key for key in scraped())


def test_what_was_declared_lasts_over_a_change_of_args(fleet: Fleet, server):
    folder = write(server.folder / "elsewhere" / "lasting", like="mirror")
    assert fleet.call("POST", "/v1/adapters", name="lasting", reference=f"local:{folder}").status_code == 201
    for args in ({"allow": ["hub:acme/*"]}, {}):
        before = fleet.pids()
        server.deploy({}, gateways=2, **args)
        until(fleet.pids, lambda now: len(now) == 4 and not now & before, seconds=120)  # noqa: B023
        until(lambda: fleet.texts("lasting"), lambda texts: texts == {answer(PROMPT, "mirror")})
    assert fleet.call("DELETE", "/v1/adapters/lasting").status_code == 200

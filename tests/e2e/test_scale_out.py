"""A second application beside the first, under a prefix and a name of its own, that starts with no replica and ends so.

The same model with other adapters, one of which has the name of one of the first application's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from examples.demo.words import answer, held_out_prompts

from .server import BASE_MODEL, ROOT, Server
from .waiting import until

PROMPTS = held_out_prompts(60)
GREEDY = {"max_tokens": 80, "temperature": 0}
ADAPTERS = ROOT / "examples" / "demo" / "adapters"
STYLES = {"shout": "mirror", "datos": "json"}  # name here -> whose content it is
SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 3.0,
    "look_back_s": 3.0,
    "interval_s": 0.5,
}


def second_application(config: dict[str, Any]) -> dict[str, Any]:
    args = {
        "model": config["model"],
        "model_name": "second-base",
        "adapters": {name: f"local:{ADAPTERS / style}" for name, style in STYLES.items()},
        "engine": config["engine"] | {"max_rows": 4, "slots": {16: 2}, "model_name": config["model_name"]},
        "store": config["store"],
        "replicas": {"autoscaling": SCALING, "num_cpus": 0.1},
        "gateway": {"num_cpus": 0.1},
    }
    path = "deployments.app:build"
    return {"name": "second", "route_prefix": "/second", "import_path": path, "args": args}


class Second:
    def __init__(self, server: Server, other) -> None:
        self.server, self.other = server, other
        self.http = httpx.Client(base_url=f"{server.url}/second", timeout=120, trust_env=False)

    def pids(self) -> set[int]:
        return set(self.server.processes("ServeReplica:second:LoraReplica"))

    def text(self, model: str, prompt: str) -> str:
        response = self.http.post("/v1/completions", json={"model": model, "prompt": prompt} | GREEDY)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def replicas(self) -> list[dict[str, Any]]:
        return self.other.call("fleet_stats", of="second")


@pytest.fixture(scope="module")
def second(server, other) -> Iterator[Second]:
    server.deploy(beside=(second_application(server.config),))
    made = Second(server, other)
    until(lambda: made.http.get("/v1/models").status_code, lambda status: status == 200)
    yield made
    made.http.close()
    server.deploy()
    until(lambda: server.processes("ServeReplica:second"), lambda found: not found)


def test_an_application_without_replicas_answers_what_needs_none(second, server):
    first = set(server.processes("ServeReplica:lorafleet"))
    models = {one["id"] for one in second.http.get("/v1/models").json()["data"]}
    assert models == {"second-base", *STYLES}
    listed = second.http.get("/v1/adapters")
    assert {one["name"] for one in listed.json()["data"]} == set(STYLES), "an operator may look, too"
    assert second.http.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code == 404
    assert second.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert second.pids() == set(), "none of this started a replica"
    assert set(server.processes("ServeReplica:lorafleet")) == first, "and the first application did not notice"


def test_requests_wait_for_the_first_replica_and_adapters_do_not_mix(second, http):
    """The first request finds no replica at all; the same name means other content in each application."""
    assert second.text("shout", PROMPTS[0]) == answer(PROMPTS[0], "mirror")
    body = {"model": "shout", "prompt": PROMPTS[0]} | GREEDY
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == answer(PROMPTS[0], "shout")
    assert second.text("datos", PROMPTS[1]) == answer(PROMPTS[1], "json")
    assert second.text("second-base", PROMPTS[2]) == answer(PROMPTS[2])
    for model in (BASE_MODEL, "spanish"):
        assert second.http.post("/v1/completions", json=body | {"model": model}).status_code == 404
    for model in ("second-base", "datos"):
        assert http.post("/v1/completions", json=body | {"model": model}).status_code == 404


async def test_streams_and_chats_under_the_prefix(second):
    transport = httpx.AsyncClient(trust_env=False, timeout=120)
    url = f"{second.server.url}/second/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=transport) as client:
        stream = await client.completions.create(model="datos", prompt=PROMPTS[3], stream=True, **GREEDY)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == answer(PROMPTS[3], "json")
        chat = [{"role": "user", "content": PROMPTS[4]}]
        made = await client.chat.completions.create(model="shout", messages=chat, **GREEDY)
        assert made.choices[0].message.content == answer(PROMPTS[4], "mirror")


def test_handles_and_metrics_go_by_the_application(second, other, server):
    made = other.call("generate", {"model": "shout", "prompt": PROMPTS[5]} | GREEDY, of="second")
    assert made["text"] == answer(PROMPTS[5], "mirror")
    made = other.call("generate", {"model": "shout", "prompt": PROMPTS[5]} | GREEDY)
    assert made["text"] == answer(PROMPTS[5], "shout")

    def told() -> set[str]:
        lines = [line for line in server.metrics().splitlines() if line.startswith("ray_lorafleet_adapters{")]
        return {name for name in ("lorafleet", "second") for line in lines if f'application="{name}"' in line}

    until(told, lambda applications: applications == {"lorafleet", "second"}, 60)


async def test_more_replicas_come_for_more_requests(second):
    """A dozen clients that go on until there are two; nobody sees an error, and every text is exact."""
    stop = asyncio.Event()

    async def client(http: httpx.AsyncClient, number: int) -> int:
        asked = 0
        while not stop.is_set():
            prompt, model = PROMPTS[(number + 12 * asked) % 60], list(STYLES)[asked % 2]
            response = await http.post("/v1/completions", json={"model": model, "prompt": prompt} | GREEDY)
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == answer(prompt, STYLES[model])
            asked += 1
        return asked

    async with httpx.AsyncClient(base_url=second.http.base_url, timeout=120, trust_env=False) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(12)]
        try:
            served = await asyncio.to_thread(
                until, second.replicas, lambda them: sum(one["generated_tokens"] > 0 for one in them) == 2, 120
            )
        finally:
            stop.set()
            counts = await asyncio.gather(*clients)
    assert len(served) == 2 and all(counts)


def test_an_idle_fleet_goes_away_and_the_next_replica_starts_warm(second):
    until(second.pids, lambda pids: not pids, 120)
    assert second.text("second-base", PROMPTS[6]) == answer(PROMPTS[6])
    only = second.replicas()
    assert len(only) == 1
    assert len(only[0]["resident"]) == 2, "both adapters, before anybody asked this replica for one"
    assert only[0]["prefetches"] == only[0]["slot_misses"] == 2
    assert second.text("shout", PROMPTS[7]) == answer(PROMPTS[7], "mirror")
    assert second.replicas()[0]["slot_misses"] == 2


def test_what_a_redeploy_brings_starts_warm_too(second, server):
    """Another version has a hub of its own, which asks the one before it."""
    second.text("datos", PROMPTS[8])
    before = second.pids()
    changed = second_application(server.config)
    changed["args"]["engine"]["max_rows"] = 5
    changed["args"]["replicas"]["autoscaling"] = SCALING | {"min_replicas": 1}
    changed["deployments"] = [{"name": "LoraReplica", "user_config": {"stream_max_delay_s": 0.05}}]
    server.deploy(beside=(changed,))
    number = 0
    while before & second.pids() or not second.pids():  # keeps the old one busy until the new one is there
        number += 1
        assert second.text("second-base", PROMPTS[number % 60]) == answer(PROMPTS[number % 60])
    only = until(second.replicas, lambda them: len(them) == 1)[0]
    assert len(only["resident"]) == 2 and only["prefetches"] == only["slot_misses"] == 2

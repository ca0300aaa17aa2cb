"""The Hub's branch moves: its adapter is served anew after ``hub_refresh_s``, without anybody asking for it."""

from __future__ import annotations

import asyncio
import json

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.api.service import CompletionService
from deployments.protocol.completions import CompletionBody
from deployments.tenants.caller import Caller
from engine.engine import Engine
from engine.settings import EngineSettings
from examples.demo.words import answer, held_out_prompts
from tests.adapter_store.hub_server import HubServer

from .conftest import BASE_MODEL, DEMO, LocalFleet

PROMPT = held_out_prompts(1)[0]


def files(like: str) -> dict[str, bytes]:
    folder = DEMO / "adapters" / like
    config = json.loads((folder / "adapter_config.json").read_text()) | {"revision": "anew"}
    weights = (folder / "adapter_model.safetensors").read_bytes()
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}


async def test_a_moved_branch_is_served_anew_on_schedule_and_never_goes_back(tmp_path):
    with HubServer() as hub:
        hub.publish("acme/tenant", files("shout"))
        store = StoreSettings(
            adapters={"tenant": "hub:acme/tenant"},
            cache_dir=str(tmp_path),
            hub_endpoint=hub.endpoint,
            hub_refresh_s=0.5,
        )
        engine = Engine(
            EngineSettings(str(DEMO / "model"), BASE_MODEL, cpu_threads=1, max_rows=8, slots=((16, 2),), store=store)
        )
        await engine.start()
        directory = AdapterDirectory(BASE_MODEL, Catalog(store), 2)
        service = CompletionService(directory, DEMO / "model", LocalFleet(engine), engine.max_model_len)

        async def text(**changes: object) -> str:
            asked = {"model": "tenant", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes
            generation = await service.start(CompletionBody.model_validate(asked), stream=False, caller=Caller())
            return (await generation.finished())[0].text

        try:
            assert await text() == answer(PROMPT, "shout")
            running = await service.start(
                CompletionBody.model_validate(
                    {"model": "tenant", "prompt": PROMPT, "temperature": 0, "max_tokens": 80}
                ),
                stream=True,
                caller=Caller(),
            )
            hub.publish("acme/tenant", files("mirror"))
            texts = [await text()]
            for _ in range(1000):
                if texts[-1] == answer(PROMPT, "mirror"):
                    break
                await asyncio.sleep(0.02)
                texts.append(await text())
            texts += [await text() for _ in range(3)]
            changed = texts.index(answer(PROMPT, "mirror"))
            assert set(texts[:changed]) <= {answer(PROMPT, "shout")}
            assert set(texts[changed:]) == {answer(PROMPT, "mirror")}
            assert (await running.finished())[0].text == answer(PROMPT, "shout"), "it began on the old content"
        finally:
            service.close()
            await engine.close()

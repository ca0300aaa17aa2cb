"""An adapter in an object store, from a client's request to its text."""

from __future__ import annotations

import json
from pathlib import Path

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.api.service import CompletionService
from deployments.protocol.completions import CompletionBody
from deployments.tenants.caller import Caller
from engine.engine import Engine
from engine.settings import EngineSettings
from examples.demo.words import answer, held_out_prompts

from .conftest import BASE_MODEL, DEMO, LocalFleet

PROMPT = held_out_prompts(1)[0]


def publish(folder: Path, like: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DEMO / "adapters" / like / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = (DEMO / "adapters" / like / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)


async def test_content_replaced_in_its_place_is_served_anew_where_the_old_cannot_be_had(tmp_path):
    """The gateway still takes the name for the old content, which a replica that never had it cannot get any more."""
    publish(tmp_path / "bucket/tenant", "shout")
    reference = f"file://{tmp_path}/bucket/tenant"
    gateway, replica = (
        StoreSettings(adapters={"tenant": reference}, cache_dir=str(tmp_path / where), hub_refresh_s=3600)
        for where in ("gateway", "replica")
    )
    engine = Engine(
        EngineSettings(str(DEMO / "model"), BASE_MODEL, cpu_threads=1, max_rows=8, slots=((16, 2),), store=replica)
    )
    await engine.start()
    directory = AdapterDirectory(BASE_MODEL, Catalog(gateway), 2)
    service = CompletionService(directory, DEMO / "model", LocalFleet(engine), engine.max_model_len)
    asked = {"model": "tenant", "prompt": PROMPT, "temperature": 0, "max_tokens": 80}

    async def text() -> str:
        generation = await service.start(CompletionBody.model_validate(asked), stream=False, caller=Caller())
        return (await generation.finished())[0].text

    try:
        old = await directory.resolve("tenant", Caller())
        publish(tmp_path / "bucket/tenant", "mirror")
        assert await directory.resolve("tenant", Caller()) == old
        assert await text() == answer(PROMPT, "mirror")
        new = await directory.resolve("tenant", Caller())
        assert new is not None and old is not None and new.digest != old.digest
        assert await directory.resolve("tenant", Caller(), gone=old.digest) == new
    finally:
        service.close()
        await engine.close()

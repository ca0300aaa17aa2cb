"""A source that does not answer is waited for by its own tenants alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapter_store.catalog import Catalog
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterNotFound
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.tenants.caller import Caller
from tests.adapter_store.hub_server import SilentHub

FILES = {CONFIG_FILE: b'{"peft_type": "LORA"}', WEIGHTS_FILE: b"weights"}


async def test_others_are_looked_up_and_what_is_known_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with SilentHub() as hub:
        for repo in ("acme/known", "globex/new", *(f"acme/silent{number}" for number in range(20))):
            hub.publish(repo, FILES)
        settings = StoreSettings(
            root=tmp_path,
            cache_dir="cache",
            allow=("hub:*",),
            hub_endpoint=hub.endpoint,
            hub_timeout_s=60,
            negative_ttl_s=60,
        )
        directory = AdapterDirectory("base", Catalog(settings), threads=2)
        known = await directory.resolve("hub:acme/known", Caller())
        with pytest.raises(AdapterNotFound):
            await directory.resolve("hub:acme/nothing", Caller())
        waiting = [asyncio.create_task(directory.resolve(f"hub:acme/silent{number}", Caller())) for number in range(20)]
        for _ in range(2):
            assert await asyncio.to_thread(hub.asked.acquire, timeout=30)
        other = await asyncio.wait_for(directory.resolve("hub:globex/new", Caller()), 20)
        assert other is not None and other.ref.id == "globex/new"
        assert await asyncio.wait_for(directory.resolve("hub:acme/known", Caller()), 20) == known
        with pytest.raises(AdapterNotFound):
            await asyncio.wait_for(directory.resolve("hub:acme/nothing", Caller()), 20)
        assert not any(task.done() for task in waiting)
        assert len(hub.requests("/silent")) == 2
        hub.released.set()
        assert len({one.digest for one in await asyncio.gather(*waiting) if one is not None}) == 1
        directory.close()

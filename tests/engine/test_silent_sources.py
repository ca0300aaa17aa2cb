"""A source that does not answer holds up adapters of its own owner alone, also those that must be downloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from tests.adapter_store.hub_server import SilentHub
from tests.engine.engines import answer, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, TinyAdapter, TinyModel


async def test_law_5_downloads_of_others_go_on_beside_a_silent_owner(
    tiny_model: Callable[..., TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = tiny_model("llama")
    adapters = [model.adapter(f"far{seed}", 8, ATTENTION, seed=seed) for seed in (1, 2)]
    with SilentHub() as hub:
        for number, adapter in enumerate(adapters):
            hub.publish(f"globex/a{number}", files_of(adapter))
        for number in range(6):
            hub.publish(f"acme/silent{number}", files_of(adapters[0]))
        base = settings_for(model)
        store = replace(
            base.store, allow=("hub:*",), hub_endpoint=hub.endpoint, hub_timeout_s=60, cache_dir=str(tmp_path / "cache")
        )
        async with running(replace(base, store=store, load_threads=2, download_threads=4)) as engine:
            cold = [
                asyncio.create_task(
                    answer(engine, ask(f"cold{number}", [3, 4], f"hub:acme/silent{number}", logprobs=0))
                )
                for number in range(6)
            ]
            assert await asyncio.to_thread(hub.asked.acquire, timeout=30)
            for number, adapter in enumerate(adapters):
                request = ask(f"far{number}", [5, 6], f"hub:globex/a{number}", logprobs=0)
                assert_same(await asyncio.wait_for(answer(engine, request), 60), expected(model, [5, 6], adapter, 8))
            assert not any(task.done() for task in cold)
            assert len(hub.requests("/silent")) == 1  # a quarter of the threads
            hub.released.set()
            for task in cold:
                assert_same(await asyncio.wait_for(task, 60), expected(model, [3, 4], adapters[0], 8))


def files_of(adapter: TinyAdapter) -> dict[str, bytes]:
    return {name: (adapter.path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}

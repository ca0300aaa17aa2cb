"""Two thousand tenants of the demo model by Zipf's law through 64 slots and little host memory: ten thousand requests,
every text exact, budgets kept, everything given back; and the same while sources, files, users and processes fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_store.digest import WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.settings import StoreSettings
from engine.engine import Engine
from engine.lora_targets import adapter_layout
from engine.settings import EngineSettings
from engine.spec import ModelSpec
from tests.adapter_store.hub_server import HubServer, hub_asked_without_token
from tests.engine.crowd import DEMO, NEW, Crowd
from tests.engine.crowd_faults import CrowdFaults, owner_of
from tests.engine.crowd_traffic import Traffic
from tests.engine.crowd_watch import Watch, at_rest, check_slots, empty
from tests.engine.engines import expected
from tests.engine.oracle import TinyAdapter, TinyModel

TENANTS = 2_000
REQUESTS = 10_000
SLOTS = {8: 48, 16: 16}


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    return Crowd(TENANTS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_asked_without_token(monkeypatch) as server:
        yield server


@asynccontextmanager
async def serving(root: Path, watch: Watch, **store: Any) -> AsyncIterator[Engine]:
    """An engine on ``root/adapters`` with host memory for 150 adapters of rank 8; free slots and pages hold NaN."""
    unit = 4 * adapter_layout(ModelSpec.from_dir(DEMO)).slab_elements(8) + 64
    settings = EngineSettings(
        model=str(DEMO),
        device="cpu",
        cpu_threads=1,
        page_size=4,
        num_pages=256,
        max_rows=64,
        max_batch_tokens=512,
        slots=tuple(SLOTS.items()),
        store=StoreSettings(root=root, folders=("adapters",), host_cache_bytes=150 * unit, **store),
        load_threads=2,
        poison=True,
    )
    engine = Engine(settings, watch.resident)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def test_the_expected_answers_are_those_of_peft(crowd: Crowd, tmp_path: Path) -> None:
    """Of two tenants of every kind; and they tell tenants apart."""
    some = crowd.tenants[:5] + crowd.tenants[-5:]
    crowd.write(tmp_path / "adapters")
    model = TinyModel(DEMO, None)
    for tenant in some:
        adapter = TinyAdapter(tmp_path / "adapters" / tenant.name, tenant.kind.rank)
        assert expected(model, tenant.prompt, adapter, NEW).tokens == tenant.tokens
    assert len({(tenant.prompt, tenant.text) for tenant in crowd.tenants}) > 0.9 * TENANTS
    assert len({tenant.digest for tenant in crowd.tenants}) == TENANTS


async def test_every_text_of_ten_thousand_requests_is_exact(crowd: Crowd, tmp_path: Path) -> None:
    crowd.write(tmp_path / "adapters")
    watch = Watch()
    async with serving(tmp_path, watch) as engine:
        looking = asyncio.create_task(watch.look(engine))
        traffic = Traffic(engine, crowd, random.Random(1))
        await traffic.run(REQUESTS)
        looking.cancel()
        stats = await at_rest(engine)
        assert traffic.ends == {"exact": REQUESTS}
        assert stats.generated_tokens == traffic.tokens == NEW * REQUESTS
        assert stats.slot_evictions > REQUESTS // 10
        assert len(stats.resident) == sum(SLOTS.values())
        assert check_slots(engine, crowd.tenants, tmp_path / "adapters") == sum(SLOTS.values())
        await empty(engine)
    assert watch.faults == []
    assert watch.looks > 50


async def test_every_text_is_exact_or_the_fault_is_told_while_everything_round_it_fails(
    crowd: Crowd, tmp_path: Path, hub: HubServer
) -> None:
    """Source errors, downloads cut short and damaged, truncated files, users that leave, processes that are killed."""
    crowd.write(tmp_path / "adapters")
    far = crowd.tenants[3:900:14]
    for tenant in far:
        hub.publish(f"{owner_of(tenant)}/{tenant.name}", tenant.files)
    near = [tenant for tenant in crowd.tenants[:200] if tenant not in far]
    disk_bytes = 20 * max(len(tenant.files[WEIGHTS_FILE]) for tenant in far)
    disk = DiskCache(tmp_path / "disk" / "adapters", disk_bytes)
    (tmp_path / "disk" / "adapters").mkdir(parents=True)
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "adapters")
    faults = CrowdFaults(hub, far, near, tmp_path / "adapters", tmp_path, disk_bytes, random.Random(2))
    watch = Watch()
    async with serving(
        tmp_path,
        watch,
        adapters={tenant.name: f"hub:{owner_of(tenant)}/{tenant.name}" for tenant in far},
        hub_endpoint=hub.endpoint,
        hub_timeout_s=0.5,
        hub_retries=1,
        hub_refresh_s=1.0,
        hub_download_timeout_s=3.0,
        negative_ttl_s=0.2,
        cache_dir=str(tmp_path / "disk"),
        cache_bytes=disk_bytes,
    ) as engine:
        looking = asyncio.create_task(watch.look(engine, disk))
        refusable = frozenset(tenant.name for tenant in (*far, *near))
        traffic = Traffic(engine, crowd, random.Random(3), leaving=0.1, refusable=refusable)
        async with faults.under_way():
            await traffic.run(REQUESTS)
        await at_rest(engine)
        assert sum(traffic.ends.values()) == REQUESTS
        assert traffic.ends["exact"] > 0.8 * REQUESTS
        assert traffic.ends["left"] > 0.05 * REQUESTS
        assert traffic.ends["AdapterUnavailable"] > 0
        assert traffic.ends["AdapterRefused"] > 0
        assert faults.happened.keys() >= {"status", "late", "cut", "damaged", "silent", "truncated", "killed"}

        assert check_slots(engine, crowd.tenants, tmp_path / "adapters") > 0
        emptied = await empty(engine)

        await asyncio.sleep(0.3)  # what failed is remembered so long
        after = Traffic(engine, crowd, random.Random(4))
        again = [tenant for tenant in crowd.tenants if tenant in far or tenant.name in traffic.failed]
        await asyncio.gather(*(after.ask(tenant) for tenant in again))
        assert after.ends == {"exact": len(again)}
        await at_rest(engine, emptied)
        looking.cancel()
    assert watch.faults == []
    assert watch.most_disk_bytes <= disk_bytes
    assert list((tmp_path / "disk" / "adapters").glob(".*")) == [], "downloads that died were left"

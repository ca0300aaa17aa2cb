"""The store: names in, packed adapters out, each loaded once."""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.host_cache import ROOM_ALIGNMENT, HostMemoryFull, Room
from adapter_store.load_stats import LoadTotals, SourceStats
from adapter_store.packed import PackedAdapter
from adapter_store.settings import StoreSettings
from adapter_store.single_flight import SingleFlight
from adapter_store.source import AdapterRef, ResolvedAdapter
from adapter_store.store import AdapterStore
from tests.adapter_store.hub_server import Fault, HubServer
from tests.adapter_store.plain_adapters import LAYOUT, adapter_files, write_adapter


class ReleasingStore(AdapterStore):
    """Gives each reference back at once: the host cache may evict, and here only when it is told to."""

    def load(
        self, adapter: str | AdapterRef | ResolvedAdapter, digest: str | None = None, room: Room | None = None
    ) -> PackedAdapter:
        packed = super().load(adapter, digest, room)
        self.host_cache.release(packed)
        return packed


def make_store(root: Path, **settings: object) -> AdapterStore:
    values = {"folders": ("adapters",), "cache_dir": "cache", "negative_ttl_s": 0.3} | settings
    (root / "adapters").mkdir(exist_ok=True)
    return ReleasingStore(StoreSettings(root=root, **values), LAYOUT, torch.float32, max_rank=8)  # type: ignore[arg-type]


def test_load_packs_what_the_name_means(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapters/a", rank=3)
    store = make_store(tmp_path)
    packed = store.load("a")
    expected = pack_checkpoint(folder, LAYOUT, 8, torch.float32, "a")
    assert (packed.name, packed.rank, packed.digest) == ("a", 3, store.resolve("a").digest)
    assert packed.digest == expected.digest
    assert torch.equal(packed.slab, expected.slab)
    assert packed.nbytes == 4 * LAYOUT.slab_elements(3)


def test_the_host_cache_answers_by_digest_without_a_source(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapters/a")
    store = make_store(tmp_path)
    packed = store.load("a")
    assert store.load("a") is packed
    for file in folder.iterdir():
        file.unlink()
    assert store.load("a", packed.digest) is packed  # a running tenant does not notice
    with pytest.raises(AdapterNotFound):
        store.load("a")
    assert store.host_cache.stats().adapters == 1


def test_host_memory_for_one_adapter_is_enough_to_load_any_and_less_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        write_adapter(tmp_path / "adapters" / name, rank=8, seed=ord(name))
    least = 4 * LAYOUT.slab_elements(8) + ROOM_ALIGNMENT
    store = make_store(tmp_path, host_cache_bytes=least)
    for name in "abab":
        packed = store.load(name)
        expected = pack_checkpoint(tmp_path / "adapters" / name, LAYOUT, 8, torch.float32, name)
        assert torch.equal(packed.slab, expected.slab)
        assert store.host_cache.digests() == (expected.digest,)
    assert store.host_cache.stats().evictions == 3
    with pytest.raises(ValueError, match=rf"host_cache_bytes is {least - 1} .*rank 8 needs {least} bytes"):
        make_store(tmp_path, host_cache_bytes=least - 1)


def test_an_adapter_waits_for_host_memory_in_use(tmp_path: Path) -> None:
    for name in "ab":
        write_adapter(tmp_path / "adapters" / name, rank=8, seed=ord(name))
    store = make_store(tmp_path, host_cache_bytes=4 * LAYOUT.slab_elements(8) + ROOM_ALIGNMENT)
    held = AdapterStore.load(store, "a")
    with pytest.raises(HostMemoryFull) as caught:
        store.load("b")
    store.host_cache.release(held)
    room = store.host_cache.reserve(caught.value.nbytes)
    assert room is not None
    with pytest.raises(AdapterNotFound):
        store.load("nobody", None, room)
    assert store.host_cache.stats().bytes == 0, "room that was not needed is free again"
    room = store.host_cache.reserve(caught.value.nbytes)
    store.host_cache.waited_only = True
    assert store.load("b", None, room).rank == 8
    assert (store.stats().pack.done, store.stats().pack.failed) == (2, 0), "to wait is not to fail"


def test_a_name_published_again_is_new_content(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/a", seed=1)
    store = make_store(tmp_path)
    old = store.load("a")
    resolved = store.resolve("a")
    write_adapter(tmp_path / "adapters/a", seed=2)
    new = store.load("a")
    assert new.digest != old.digest
    assert not torch.equal(new.slab, old.slab)
    assert store.load("a", old.digest) is old  # rows that began with it end with it
    store.host_cache.clear()
    for gone in (lambda: store.load("a", old.digest), lambda: store.load(resolved)):
        with pytest.raises(AdapterChanged, match=old.digest[:12]):
            gone()


@pytest.mark.parametrize("damage", [pytest.param(b"\x40", id="that packs"), pytest.param(b"", id="that does not")])
def test_files_are_packed_while_they_are_hashed_and_what_is_damaged_reaches_nobody(
    hub: HubServer, tmp_path: Path, damage: bytes
) -> None:
    """Packing begins before the hash is known: it may see, and may refuse, what nobody asked for."""
    hub.publish("acme/far", adapter_files())
    store = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint)
    whole = store.load("far").slab.clone()
    store.host_cache.clear()
    (weights,) = (tmp_path / "cache").rglob(WEIGHTS_FILE)
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + damage)
    assert torch.equal(store.load("far").slab, whole)
    assert weights.read_bytes() == data
    assert len(hub.requests(WEIGHTS_FILE)) > 1, "it came again"
    assert not store.stats().sources.remembered_failures


@pytest.mark.parametrize("as_it_is", [dict[str, Any](seed=2), dict[str, Any](use_dora=True)], ids=["good", "refused"])
def test_a_folder_that_changed_is_told_so_whatever_is_in_it_now(tmp_path: Path, as_it_is: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "adapters/a", seed=1)
    store = make_store(tmp_path)
    digest = store.resolve("a").digest
    write_adapter(folder, **as_it_is)
    with pytest.raises(AdapterChanged, match=digest[:12]):
        store.load(f"local:{folder}", digest)
    assert store.stats().host.adapters == 0
    assert not store.stats().sources.remembered_failures


def test_who_may_load_by_reference(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "elsewhere/a")
    store = make_store(tmp_path, adapters={"declared": "local:elsewhere/a"})
    digest = store.resolve("declared").digest
    reference = f"local:{folder}"
    with pytest.raises(AdapterNotFound, match="allow"):
        store.load(reference)  # as a client would name it
    assert store.load(reference, digest).digest == digest  # as a gateway that resolved it does
    store.host_cache.clear()
    assert store.load(reference, digest).digest == digest
    assert store.load(AdapterRef.parse(reference)).digest == digest
    assert store.load(store.resolve("declared")).digest == digest
    with pytest.raises(AdapterChanged):
        store.load(reference, "0" * 64)
    with pytest.raises(AdapterNotFound, match="Hub repository"):
        store.load("hub:../x", "0" * 64)
    with pytest.raises(AdapterNotFound, match="any more"):
        store.load(f"local:{tmp_path}/gone", digest[::-1])


def test_a_pinned_hub_reference_with_its_digest_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        hub.publish("acme/far", adapter_files())
        gateway = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint)
        resolved = gateway.resolve("far")
        replica = make_store(tmp_path, cache_dir="other", hub_endpoint=hub.endpoint)
        assert replica.load(str(resolved.ref), resolved.digest).digest == resolved.digest
        assert len(hub.requests("/api/")) == 1
        with pytest.raises(AdapterRefused, match="not the content"):
            replica.load(str(resolved.ref), "0" * 64)


def test_what_loading_took_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    write_adapter(tmp_path / "adapters/near")
    write_adapter(tmp_path / "adapters/bad", use_dora=True)
    with HubServer() as hub:
        files = adapter_files(seed=3)
        hub.publish("acme/far", files)
        store = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint)
        nothing = store.stats()
        assert (nothing.sources, nothing.pack) == (SourceStats(), LoadTotals())
        near, far = store.load("near"), store.load("far")
        store.host_cache.clear()
        store.load("far")
        for _ in range(3):
            with pytest.raises(AdapterRefused):
                store.load("bad")
    size = sum(len(data) for data in files.values())
    stats = store.stats()
    assert (stats.sources.download.done, stats.sources.download.bytes) == (1, size)
    assert (stats.sources.disk_hits, stats.sources.disk_misses) == (1, 1)
    assert (stats.pack.done, stats.pack.failed, stats.pack.bytes) == (3, 1, near.nbytes + 2 * far.nbytes)
    assert stats.sources.read.bytes > size
    assert (stats.sources.remembered_failures, stats.sources.failures_repeated) == (1, 2)
    assert min(stats.sources.download.seconds, stats.sources.read.seconds, stats.pack.seconds) > 0
    assert stats.host.adapters == 1
    assert (nothing.disk.adapters, stats.disk.adapters, stats.disk.bytes) == (0, 1, size)


def test_a_refusal_names_the_adapter_that_was_asked_for(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/bad", use_dora=True)
    write_adapter(tmp_path / "adapters/same", use_dora=True)
    store = make_store(tmp_path)
    for name in ("bad", "same", "bad"):
        with pytest.raises(AdapterRefused, match="use_dora") as error:
            store.load(name)
        assert error.value.adapter == name
    write_adapter(tmp_path / "adapters/bad")  # repaired: other content, served at once
    assert store.load("bad").rank == 4


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what torch keeps among its objects
def test_a_refused_adapter_takes_no_memory(tmp_path: Path) -> None:
    """Neither the remembered refusal nor a reference cycle keeps the frames that held its files and its slab."""

    def tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    write_adapter(tmp_path / "adapters/bad", lora_alpha=1e300)
    store = make_store(tmp_path, negative_ttl_s=60)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(2):
            try:
                store.load("bad")
            except AdapterRefused as error:
                assert "overflow" in error.reason
            assert tensors() == before
    finally:
        gc.enable()


def test_a_remembered_refusal_gathers_no_frames(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/bad", use_dora=True)
    store = make_store(tmp_path, negative_ttl_s=60)
    depths = []
    for _ in range(4):
        with pytest.raises(AdapterRefused) as caught:
            store.load("bad")
        depths.append(len(caught.traceback))
    assert depths[1] == depths[2] == depths[3]


def test_one_tenants_bad_adapter_changes_nothing_for_another(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/good")
    write_adapter(tmp_path / "adapters/bad", r=5)
    (write_adapter(tmp_path / "adapters/worse") / CONFIG_FILE).write_bytes(b"\xff\xfe")
    write_adapter(tmp_path / "adapters/other", base_model_name_or_path="acme/another")
    store = make_store(tmp_path)

    def one(number: int) -> str:
        try:
            return str(store.load(("good", "bad", "worse", "other")[number % 4]).rank)
        except AdapterRefused as error:
            return error.adapter

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(80))) == ["4", "bad", "worse", "other"] * 20


def test_threads_share_one_load(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/a", seed=1)
    write_adapter(tmp_path / "adapters/alias", seed=1)  # the same content under another name
    write_adapter(tmp_path / "adapters/b", seed=2)
    store = make_store(tmp_path)
    gate = threading.Barrier(12)

    def one(number: int) -> int:
        gate.wait()
        return id(store.load(("a", "alias", "b")[number % 3]))

    with ThreadPoolExecutor(12) as pool:
        objects = list(pool.map(one, range(12)))
    assert len(set(objects)) == 2
    assert store.host_cache.stats().adapters == 2


def test_a_slow_source_delays_only_those_who_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    write_adapter(tmp_path / "adapters/near")
    with HubServer() as hub, ThreadPoolExecutor(1) as pool:
        hub.publish("acme/far", adapter_files(seed=3))
        hub.fail(Fault("/cdn/", delay_s=1.5))
        store = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint)
        started = time.monotonic()
        far = pool.submit(store.load, "far")
        time.sleep(0.1)
        for _ in range(20):
            store.load("near")
            store.host_cache.clear()
        assert time.monotonic() - started < 1.4
        assert far.result().digest != store.load("near").digest
        assert time.monotonic() - started > 1.4


def test_a_failed_download_is_remembered_but_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        hub.publish("acme/far", adapter_files())
        hub.fail(Fault("/cdn/", status=503))
        limits = {"hub_retries": 0, "negative_ttl_s": 1.0}
        store = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint, **limits)
        resolved = store.resolve("far")
        key = (str(resolved.ref), resolved.digest)
        assert not store.at_hand(*key)
        for _ in range(3):
            with pytest.raises(AdapterUnavailable, match="503"):
                store.load(*key)
            assert store.at_hand(*key)  # it takes no thread for downloads to say so again
        assert len(hub.requests("/cdn/")) == 1
        assert (store.stats().sources.remembered_failures, store.stats().sources.failures_repeated) == (1, 2)
        time.sleep(1.05)
        assert store.load(*key).rank == 4
        assert store.stats().sources.remembered_failures == 0
        assert store.stats().sources.download.failed == 1


def test_a_failed_load_gives_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        for number in range(4):
            hub.publish(f"acme/a{number}", adapter_files(seed=number))
        adapters = {f"a{number}": f"hub:acme/a{number}" for number in range(4)}
        limits = {"hub_retries": 0, "hub_timeout_s": 0.3, "negative_ttl_s": 0}
        store = make_store(tmp_path, adapters=adapters, hub_endpoint=hub.endpoint, **limits)
        faults = (
            Fault("/cdn/", cut=0.5),
            Fault("/cdn/", status=500),
            Fault("/cdn/", delay_s=0.8),
            Fault("/api/", status=404),
        )
        for fault in faults:
            hub.fail(fault)
            for name in adapters:
                with contextlib.suppress(AdapterError):
                    store.load(name)
            store.host_cache.clear()
            shutil.rmtree(tmp_path / "cache")
        assert store.stats().sources.download.failed >= 3
        assert (store.host_cache.stats().adapters, store.host_cache.stats().bytes) == (0, 0)
        for name in adapters:
            assert store.load(name).rank == 4
        assert list((tmp_path / "cache/adapters").glob(".*")) == []
        assert list((tmp_path / "cache/adapters/locks").iterdir()) == []


def test_a_hub_adapter_too_large_for_this_model_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as hub:
        files = adapter_files()
        files["adapter_model.safetensors"] += bytes(20 << 20)
        hub.publish("acme/far", files)
        store = make_store(tmp_path, adapters={"far": "hub:acme/far"}, hub_endpoint=hub.endpoint)
        with pytest.raises(AdapterRefused, match="at most"):
            store.load("far")
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_close_drops_what_is_held(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/a")
    store = make_store(tmp_path)
    store.load("a")
    store.close()
    assert store.host_cache.digests() == ()


def test_single_flight_shares_results_and_failures_but_remembers_neither() -> None:
    flights: SingleFlight[object] = SingleFlight()
    ran: list[int] = []
    entered, leave = threading.Event(), threading.Event()

    def work() -> object:
        ran.append(1)
        entered.set()
        leave.wait(5)
        if len(ran) == 1:
            raise AdapterError("x", "first time")
        return ran

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(flights.run, "key", work)
        entered.wait(5)
        followers = [pool.submit(flights.run, "key", work) for _ in range(2)]
        assert flights.run("other key", lambda: 7) == 7  # another key does not wait
        time.sleep(0.1)
        leave.set()
        for future in (first, *followers):
            assert isinstance(future.exception(), AdapterError)
    assert len(ran) == 1
    assert flights.run("key", work) is ran
    assert len(ran) == 2

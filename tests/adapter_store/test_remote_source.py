"""What all sources on a network have in common, shown with the Hub: answers kept and dropped, failures, shared work."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.remote_source import RemoteSource
from adapter_store.source import AdapterRef
from tests.adapter_store.fetching import hub_source
from tests.adapter_store.hub_server import TOKEN, Fault, HubServer

FILES = {CONFIG_FILE: json.dumps({"peft_type": "LORA", "r": 4}).encode(), WEIGHTS_FILE: b"weights" * 10_000}
REF = AdapterRef.parse("hub:acme/shout")


def source(hub: HubServer, tmp_path: Path, **changes: object) -> RemoteSource:
    return hub_source(hub.endpoint, tmp_path, **changes)


def weights(files: CheckpointFiles) -> bytes:
    return files.weights.numpy().tobytes()


def test_an_outage_keeps_the_last_known_commit(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path, hub_refresh_s=0.0, hub_retries=0)
    before = store.resolve("shout", REF)
    hub.fail(Fault("/api/", status=503))
    assert store.resolve("shout", REF) == before
    hub.repos["acme/shout"].access = "private"  # but a repository that was closed is closed
    time.sleep(0.25)
    with pytest.raises(AdapterNotFound):
        store.resolve("shout", REF)
    hub.fail(*[Fault("/api/", status=503)] * 9)
    time.sleep(0.25)
    with pytest.raises(AdapterUnavailable):  # and an outage does not open it again
        store.resolve("shout", REF)


def test_access_that_was_taken_away_is_noticed_at_the_next_refresh(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = hub.publish("acme/shout", FILES, access="private")
    pinned = AdapterRef.parse(f"hub:acme/shout@{commit}")
    store = source(hub, tmp_path, hub_refresh_s=0.2)
    for ref in (REF, pinned):
        store.fetch(store.resolve("shout", ref))
    hub.token = "hf_another"  # the server's token was revoked
    again = source(hub, tmp_path, hub_refresh_s=0.2)  # a process that starts now, on the same disk cache
    time.sleep(0.25)
    for one in (store, again):
        for ref in (REF, pinned):
            with pytest.raises(AdapterNotFound, match="HF_TOKEN"):
                one.resolve("shout", ref)
    hub.fail(*[Fault("/api/", status=503)] * 99)
    time.sleep(0.25)
    for one in (store, again, source(hub, tmp_path)):  # and an outage does not open it again
        for ref in (REF, pinned):
            with pytest.raises(AdapterUnavailable):
                one.resolve("shout", ref)


def test_a_commit_on_this_machine_is_served_while_the_hub_is_down(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.publish("acme/shout", FILES)
    first = source(hub, tmp_path)
    resolved = first.resolve("shout", AdapterRef.parse(f"hub:acme/shout@{commit}"))
    first.fetch(resolved)
    hub.fail(*[Fault("/api/", status=503)] * 9)
    again = source(hub, tmp_path, hub_retries=8)
    started = time.monotonic()
    assert again.resolve("shout", resolved.ref) == resolved
    assert time.monotonic() - started < 4  # one try: nobody needs to wait for what is here
    with pytest.raises(AdapterUnavailable):
        source(hub, tmp_path / "elsewhere").resolve("shout", resolved.ref)


def test_what_is_known_is_recalled_without_asking(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path, hub_refresh_s=1.0)
    assert store.recall("shout", REF) is None
    resolved = store.resolve("shout", REF)
    assert store.recall("shout", REF) == resolved
    store.forget(REF)
    assert store.recall("shout", REF) is None
    store.resolve("shout", REF)
    time.sleep(1.05)
    assert store.recall("shout", REF) is None
    assert len(hub.requests("/api/")) == 2
    with pytest.raises(AdapterNotFound):
        store.resolve("x", AdapterRef.parse("hub:acme/nothing"))
    with pytest.raises(AdapterNotFound, match="adapter 'y'"):
        store.recall("y", AdapterRef.parse("hub:acme/nothing"))


def test_while_one_waits_for_the_hubs_word_the_others_are_served(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path, hub_refresh_s=2.0)
    before = store.resolve("shout", REF)
    time.sleep(2.05)
    commit = hub.publish("acme/shout", {**FILES, WEIGHTS_FILE: b"new"})
    hub.fail(Fault("/api/", delay_s=1.5))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.resolve, "shout", REF)
        while len(hub.requests("/api/")) < 2:
            time.sleep(0.005)
        assert store.resolve("shout", REF) == before
        assert first.result().ref.revision == commit
    assert store.resolve("shout", REF).ref.revision == commit


def test_failures_are_remembered_briefly(hub: HubServer, tmp_path: Path) -> None:
    store = source(hub, tmp_path, negative_ttl_s=0.3)
    for name in ("one", "two"):
        with pytest.raises(AdapterNotFound) as missing:
            store.resolve(name, REF)
        assert missing.value.adapter == name
    assert len(hub.requests("/api/")) == 1
    assert (store.stats().remembered_failures, store.stats().failures_repeated) == (1, 1)
    hub.publish("acme/shout", FILES)
    time.sleep(0.35)
    assert store.stats().remembered_failures == 0
    assert store.resolve("three", REF).digest


def test_altered_content_is_fetched_once_more(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", REF)
    hub.fail(Fault("/cdn/", corrupt=True))
    assert store.fetch(resolved).digest() == resolved.digest
    assert len(hub.requests("/cdn/")) == 2


def test_altered_content_is_then_refused_by_name(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", REF)
    hub.fail(*[Fault("/cdn/", corrupt=True)] * 2)
    with pytest.raises(AdapterRefused, match="not the content") as refused:
        store.fetch(resolved)
    assert refused.value.adapter == "shout"
    assert len(hub.requests("/cdn/")) == 2
    assert not DiskCache(tmp_path / "cache", 0).sizes()
    assert store.fetch(resolved).digest() == resolved.digest  # nothing of it stays


def test_a_damaged_cache_entry_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", REF)
    store.fetch(resolved)
    (tmp_path / "cache" / resolved.digest / WEIGHTS_FILE).write_bytes(b"bit rot")
    assert weights(store.fetch(resolved)) == FILES[WEIGHTS_FILE]


def test_threads_share_one_look_up_and_one_download(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(Fault("/api/", delay_s=0.3), Fault("/cdn/", delay_s=0.3))
    store = source(hub, tmp_path)
    gate = threading.Barrier(8)

    def one(number: int) -> str:
        gate.wait()
        return store.fetch(store.resolve(f"name{number}", REF)).digest()

    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(one, range(8)))
    assert len(digests) == 1
    assert len(hub.requests("/api/")) == 1
    assert len(hub.requests("/cdn/")) == 1


def test_a_shared_failure_carries_each_callers_name(hub: HubServer, tmp_path: Path) -> None:
    hub.fail(Fault("/api/", delay_s=0.3))
    store = source(hub, tmp_path)
    gate = threading.Barrier(4)

    def one(number: int) -> str:
        gate.wait()
        try:
            store.resolve(f"name{number}", REF)
        except AdapterError as error:
            return error.adapter
        return ""

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [f"name{number}" for number in range(4)]


def test_the_disk_cache_keeps_to_its_budget(hub: HubServer, tmp_path: Path) -> None:
    store = source(hub, tmp_path, cache_bytes=150_000)  # two adapters of 70 kB
    resolved = []
    for number in range(4):
        content = hashlib.sha256(bytes([number])).digest() * 2_200
        hub.publish(f"acme/a{number}", {**FILES, WEIGHTS_FILE: content})
        resolved.append(store.resolve("x", AdapterRef.parse(f"hub:acme/a{number}")))
        store.fetch(resolved[-1])
        if number == 2:
            store.fetch(resolved[1])  # used again, so 2 goes before 1
    assert set(DiskCache(tmp_path / "cache", 0).sizes()) == {resolved[1].digest, resolved[3].digest}
    assert store.fetch(resolved[0]).digest() == resolved[0].digest

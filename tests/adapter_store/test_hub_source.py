"""The Hub source against a real HTTP server that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.hub_client import HubClient
from adapter_store.local_source import LocalSource
from adapter_store.remote_source import RemoteSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef
from tests.adapter_store.hub_server import Fault, HubServer

TOKEN = "hf_a_secret_that_must_not_leak"
CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()
FILES = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"weights" * 10_000, "README.md": b"# an adapter"}
REF = AdapterRef.parse("hub:acme/shout")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer(token=TOKEN) as server:
        yield server


def source(hub: HubServer, tmp_path: Path, **changes: object) -> RemoteSource:
    values = {"hub_timeout_s": 2.0, "hub_retries": 2, "hub_refresh_s": 60.0, "negative_ttl_s": 0.2} | changes
    settings = StoreSettings(root=tmp_path, hub_endpoint=hub.endpoint, **values)  # type: ignore[arg-type]
    return RemoteSource(settings, HubClient(settings), DiskCache(tmp_path / "cache", settings.cache_bytes))


def weights(files: CheckpointFiles) -> bytes:
    return files.weights.numpy().tobytes()


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes(FILES[name])
    return folder


def test_resolve_pins_the_commit_and_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.publish("acme/shout", FILES)
    resolved = source(hub, tmp_path).resolve("shout", REF)
    assert (resolved.name, resolved.ref) == ("shout", AdapterRef("hub", "acme/shout", commit))
    assert not hub.requests("/resolve/")


def test_a_local_copy_has_the_same_digest(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    folder = write_folder(tmp_path / "copy")
    local = LocalSource().resolve("copy", AdapterRef("local", str(folder)))
    assert source(hub, tmp_path).resolve("shout", REF).digest == local.digest


def test_fetch_downloads_once_and_later_runs_need_no_network(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    first = source(hub, tmp_path)
    resolved = first.resolve("shout", REF)
    files = first.fetch(resolved)
    assert (files.config, weights(files)) == (FILES[CONFIG_FILE], FILES[WEIGHTS_FILE])
    assert first.fetch(resolved).digest() == resolved.digest
    assert len(hub.requests("/resolve/")) == 2
    assert not hub.requests("README")
    hub.stop()
    again = source(hub, tmp_path)  # a new process after a restart, the Hub down
    assert again.resolve("shout", resolved.ref) == resolved
    assert weights(again.fetch(resolved)) == FILES[WEIGHTS_FILE]


def test_a_branch_is_asked_again_only_after_its_time(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    lasting, brief = source(hub, tmp_path), source(hub, tmp_path, hub_refresh_s=0.0)
    old = lasting.resolve("shout", REF)
    assert brief.resolve("shout", REF) == old
    commit = hub.publish("acme/shout", {**FILES, WEIGHTS_FILE: b"new weights"})
    assert lasting.resolve("shout", REF) == old
    new = brief.resolve("shout", REF)
    assert new.ref.revision == commit
    assert new.digest != old.digest


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    first = hub.publish("acme/shout", FILES, ref="v1")
    hub.publish("acme/shout", {**FILES, WEIGHTS_FILE: b"other"})
    store = source(hub, tmp_path)
    assert store.resolve("x", AdapterRef.parse("hub:acme/shout@v1")).ref.revision == first
    pinned = AdapterRef.parse(f"hub:acme/shout@{first}")
    assert store.resolve("x", pinned).ref == pinned
    with pytest.raises(AdapterNotFound, match="v9"):
        store.resolve("x", AdapterRef.parse("hub:acme/shout@v9"))


@pytest.mark.parametrize("access", ["private", "gated"])
def test_closed_repositories_need_the_token(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    hub.publish("acme/shout", FILES, access=access)
    with pytest.raises(AdapterNotFound, match="HF_TOKEN"):
        source(hub, tmp_path).resolve("shout", REF)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    opened = source(hub, tmp_path)
    assert opened.fetch(opened.resolve("shout", REF)).config == CONFIG


def test_a_saved_login_is_not_used(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_meant_for_something_else")
    hub.publish("acme/shout", FILES)
    source(hub, tmp_path, hub_token_env="LORAFLEET_TOKEN").resolve("shout", REF)
    assert [seen.authorization for seen in hub.requests()] == [None]


def test_the_token_goes_to_the_hub_alone_and_into_no_message(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.publish("acme/shout", FILES, access="private")
    hub.fail(Fault("/api/", status=503), Fault("/cdn/", cut=0.5))
    store = source(hub, tmp_path)
    store.fetch(store.resolve("shout", REF))
    hub.fail(*[Fault("/api/", status=500)] * 9)
    with pytest.raises(AdapterUnavailable) as failed:
        source(hub, tmp_path).resolve("shout", REF)
    assert all(seen.authorization == f"Bearer {TOKEN}" for seen in hub.requests("acme"))
    content_network = hub.requests("/cdn/")
    assert content_network
    assert all(seen.authorization is None for seen in content_network)
    chain = repr((failed.value, failed.value.__cause__, store, vars(store), pickle.dumps(failed.value)))
    assert TOKEN not in chain + caplog.text


def test_missing_repositories_and_unusable_ones(hub: HubServer, tmp_path: Path) -> None:
    store = source(hub, tmp_path)
    with pytest.raises(AdapterNotFound, match="acme/nothing"):
        store.resolve("x", AdapterRef.parse("hub:acme/nothing"))
    hub.publish("acme/model", {"config.json": b"{}"})
    with pytest.raises(AdapterRefused, match=CONFIG_FILE):
        store.resolve("x", AdapterRef.parse("hub:acme/model"))
    hub.publish("acme/pickle", {CONFIG_FILE: CONFIG, "adapter_model.bin": b"\x80\x04."})
    with pytest.raises(AdapterRefused, match="pickle"):
        store.resolve("x", AdapterRef.parse("hub:acme/pickle"))
    assert not hub.requests("adapter_model.bin")


def test_failures_that_pass_are_tried_again(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(Fault("/api/", status=500), Fault("/api/", status=429, headers={"Retry-After": "1"}))
    hub.fail(Fault("/resolve/", status=502), Fault("/cdn/", cut=0.3))
    store = source(hub, tmp_path)
    started = time.monotonic()
    resolved = store.resolve("shout", REF)
    assert time.monotonic() - started >= 1.0  # as Retry-After asked
    assert weights(store.fetch(resolved)) == FILES[WEIGHTS_FILE]


def test_failures_that_stay_end_soon(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", REF)
    hub.fail(*[Fault("/cdn/", cut=0.5)] * 3)
    with pytest.raises(AdapterUnavailable, match="could not be reached"):
        store.fetch(resolved)
    assert len(hub.requests("/cdn/")) == 3
    assert files_in(tmp_path / "cache") == []  # nothing half done is left
    with pytest.raises(AdapterUnavailable, match="could not be reached"):
        store.fetch(resolved)
    assert len(hub.requests("/cdn/")) == 3  # answered at once
    time.sleep(0.25)
    assert weights(store.fetch(resolved)) == FILES[WEIGHTS_FILE]


def test_a_silent_hub_is_given_up_on(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(*[Fault("/api/", delay_s=1.5)] * 2)
    store = source(hub, tmp_path, hub_timeout_s=0.2, hub_retries=1)
    started = time.monotonic()
    with pytest.raises(AdapterUnavailable, match="Timeout"):
        store.resolve("shout", REF)
    assert time.monotonic() - started < 1.2


def test_a_download_has_a_deadline(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path, hub_retries=10, hub_download_timeout_s=0.5)
    resolved = store.resolve("shout", REF)
    hub.fail(*[Fault("/resolve/", status=503)] * 50)
    started = time.monotonic()
    with pytest.raises(AdapterUnavailable, match="503"):
        store.fetch(resolved)
    assert time.monotonic() - started < 1.5


def test_nobody_listening(hub: HubServer, tmp_path: Path) -> None:
    hub.stop()
    with pytest.raises(AdapterUnavailable, match="could not be reached"):
        source(hub, tmp_path, hub_retries=0).resolve("shout", REF)


def test_offline_mode_is_named(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.publish("acme/shout", FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the library reads the variable when it is imported
    with pytest.raises(AdapterUnavailable, match="HF_HUB_OFFLINE"):
        source(hub, tmp_path).resolve("shout", REF)
    assert not hub.requests()


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


def test_each_organisation_may_have_its_own_token(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_everyone")
    monkeypatch.setenv("ACME_TOKEN", TOKEN)
    hub.publish("acme/shout", FILES, access="private")
    hub.publish("acme-evil/shout", FILES, access="private")
    store = source(hub, tmp_path, sources={"hub:acme": {"env": {"token": "ACME_TOKEN"}}})
    store.fetch(store.resolve("shout", REF))
    with pytest.raises(AdapterNotFound, match="HF_TOKEN"):
        store.resolve("shout", AdapterRef.parse("hub:acme-evil/shout"))
    assert {seen.authorization for seen in hub.requests("acme/")} == {f"Bearer {TOKEN}"}
    assert {seen.authorization for seen in hub.requests("acme-evil/")} == {"Bearer hf_of_everyone"}


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


def test_files_too_large_are_refused_before_they_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", REF)
    with pytest.raises(AdapterRefused, match="70000 bytes; at most 1000"):
        store.fetch(resolved, max_weights_bytes=1000)


def test_a_hub_that_lists_no_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = write_folder(tmp_path / "copy")
    with HubServer(list_hashes=False) as hub:
        hub.publish("acme/shout", FILES)
        store = source(hub, tmp_path)
        resolved = store.resolve("shout", REF)
        assert resolved.digest == LocalSource().resolve("c", AdapterRef("local", str(folder))).digest
        assert weights(store.fetch(resolved)) == FILES[WEIGHTS_FILE]
        assert len(hub.requests("/cdn/")) == 1


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


def test_an_unwritable_cache_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = source(hub, tmp_path)
    with pytest.raises(AdapterUnavailable, match="cache_dir"):
        store.fetch(store.resolve("shout", REF))

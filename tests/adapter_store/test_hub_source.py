"""The Hub source against a real HTTP server that speaks the Hub's API."""

from __future__ import annotations

import json
import logging
import pickle
import time
from pathlib import Path

import pytest

from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.local_source import LocalSource
from adapter_store.remote_source import RemoteSource
from adapter_store.source import AdapterRef
from tests.adapter_store.fetching import hub_source
from tests.adapter_store.hub_server import TOKEN, Fault, HubServer

CONFIG = json.dumps({"peft_type": "LORA", "r": 4}).encode()
FILES = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"weights" * 10_000, "README.md": b"# an adapter"}
REF = AdapterRef.parse("hub:acme/shout")


def source(hub: HubServer, tmp_path: Path, **changes: object) -> RemoteSource:
    return hub_source(hub.endpoint, tmp_path, **changes)


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


def test_an_unwritable_cache_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    (tmp_path / "cache").write_text("a file where the folder should be")
    store = source(hub, tmp_path)
    with pytest.raises(AdapterUnavailable, match="cache_dir"):
        store.fetch(store.resolve("shout", REF))

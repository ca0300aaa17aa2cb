"""Object stores: a real S3-speaking server behind a proxy that can break, and fsspec's own memory and file systems."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterChanged, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.local_source import LocalSource
from adapter_store.object_client import ObjectClient
from adapter_store.remote_source import RemoteSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef
from tests.adapter_store.faulty_proxy import FaultyProxy
from tests.adapter_store.hub_server import Fault

SECRET = "a-secret-that-must-not-leak"
SESSION = "a-session-token-that-must-not-leak"
FILES = {CONFIG_FILE: json.dumps({"peft_type": "LORA", "r": 4}).encode(), WEIGHTS_FILE: b"weights" * 10_000}
NEW = {**FILES, WEIGHTS_FILE: b"another" * 10_000}


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Bucket:
    """A bucket of its own for each test, reached by the publisher directly and by us through the proxy."""

    def __init__(self, server: str, proxy: FaultyProxy) -> None:
        self.name = f"acme-{uuid.uuid4().hex[:12]}"
        self.proxy = proxy
        self.client = boto3.client(
            "s3", endpoint_url=server, aws_access_key_id="x", aws_secret_access_key="y", region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=self.name)

    def publish(self, prefix: str, files: Mapping[str, bytes] = FILES) -> AdapterRef:
        for file, data in files.items():
            self.client.put_object(Bucket=self.name, Key=f"{prefix}/{file}", Body=data)
        return AdapterRef.parse(f"s3://{self.name}/{prefix}")

    def source(self, root: Path, env: Mapping[str, str] | None = None, **changes: Any) -> RemoteSource:
        settings = StoreSettings(
            root=root,
            negative_ttl_s=changes.pop("negative_ttl_s", 0.2),
            cache_bytes=changes.pop("cache_bytes", 1 << 30),
            sources={
                "s3://": {
                    "options": {"endpoint_url": self.proxy.endpoint, "client_kwargs": {"region_name": "us-east-1"}},
                    "env": env or {"key": "ACME_KEY", "secret": "ACME_SECRET", "token": "ACME_SESSION"},
                    **{"timeout_s": 2.0, "retries": 2, "refresh_s": 60.0, "download_timeout_s": 10.0},
                    **changes,
                }
            },
        )
        return RemoteSource(settings, ObjectClient(settings), DiskCache(root / "cache", settings.cache_bytes))


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("ACME_KEY", "AKIA-ACME")
    monkeypatch.setenv("ACME_SECRET", SECRET)
    monkeypatch.setenv("ACME_SESSION", SESSION)
    with FaultyProxy(moto) as proxy:
        yield Bucket(moto, proxy)


def write_folder(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_an_adapter_is_resolved_to_its_content_and_fetched_once(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("loras/shout")
    store = bucket.source(tmp_path)
    resolved = store.resolve("shout", ref)
    local = LocalSource().resolve("copy", AdapterRef("local", str(write_folder(tmp_path / "copy"))))
    assert resolved.digest == local.digest
    assert str(resolved.ref) == f"{ref}@{local.digest}"
    assert resolved.ref.pinned
    assert store.fetch(resolved).weights.numpy().tobytes() == FILES[WEIGHTS_FILE]
    assert len(bucket.proxy.requests(f"GET /{bucket.name}/loras/shout/{WEIGHTS_FILE}")) == 1
    assert AdapterRef.parse(str(resolved.ref)) == resolved.ref


def test_a_later_run_asks_and_downloads_nothing(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    first = bucket.source(tmp_path).resolve("shout", ref)
    objects = f"GET /{bucket.name}/shout/"
    got = len(bucket.proxy.requests(objects))
    again = bucket.source(tmp_path)
    assert again.resolve("shout", ref) == first
    assert again.fetch(first).digest() == first.digest
    assert len(bucket.proxy.requests(objects)) == got > 0


def test_a_chat_template_is_found_by_one_listing_and_read_again_when_it_changed(bucket: Bucket, tmp_path: Path) -> None:
    file, store = "chat_template.jinja", bucket.source(tmp_path, refresh_s=0.0)
    first = store.resolve("shout", bucket.publish("shout"))
    assert first.template is None
    assert len(bucket.proxy.requests("HEAD")) == 2 + 2 * 2, "a look, and the download between two of its kind"
    for text in (b"one", b"two"):
        found = store.resolve("shout", bucket.publish("shout", {file: text}))
        assert store.templates(found) == store.templates(found) == {"default": text.decode()}
        assert found.digest == first.digest
    assert len(bucket.proxy.requests(f"GET /{bucket.name}/shout/{file}")) == 2
    assert len(bucket.proxy.requests("list-type")) == 3, "one for each look"


def test_a_new_publication_is_picked_up_at_the_next_refresh(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    lasting, brief = bucket.source(tmp_path), bucket.source(tmp_path, refresh_s=0.0)
    old = lasting.resolve("shout", ref)
    bucket.publish("shout", NEW)
    new = brief.resolve("shout", ref)
    assert new.digest != old.digest
    assert brief.fetch(new).weights.numpy().tobytes() == NEW[WEIGHTS_FILE]
    assert lasting.resolve("shout", ref) == old
    assert lasting.fetch(old).digest() == old.digest  # running requests finish on it: it is in the disk cache
    lasting.forget(ref)
    assert lasting.resolve("shout", ref) == new


def test_content_that_was_replaced_before_it_came_is_told(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    old = bucket.source(tmp_path / "a").resolve("shout", ref)
    bucket.publish("shout", NEW)
    with pytest.raises(AdapterChanged, match=old.digest[:12]):
        bucket.source(tmp_path / "b").fetch(old)


def test_a_reference_can_be_pinned_to_its_content(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    pinned = bucket.source(tmp_path / "a").resolve("shout", ref).ref
    store = bucket.source(tmp_path / "b", refresh_s=0.0)
    resolved = store.resolve("shout", pinned)
    assert (resolved.ref, resolved.digest) == (pinned, pinned.revision)
    assert not [line for line in bucket.proxy.requests("GET") if WEIGHTS_FILE in line][1:]  # it was not needed to know
    store.fetch(resolved)
    bucket.publish("shout", NEW)
    assert store.resolve("shout", pinned) == resolved  # what is here is what was wanted
    other = bucket.source(tmp_path / "c")
    other.resolve("new", ref)
    with pytest.raises(AdapterRefused, match="pinned"):
        other.resolve("shout", pinned)


def test_what_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    store = bucket.source(tmp_path)
    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        store.resolve("x", AdapterRef.parse(f"s3://{bucket.name}/nothing"))
    with pytest.raises(AdapterNotFound, match="no-such-bucket"):
        store.resolve("x", AdapterRef.parse("s3://no-such-bucket/shout"))
    config = {CONFIG_FILE: FILES[CONFIG_FILE]}
    with pytest.raises(AdapterRefused, match=WEIGHTS_FILE):
        store.resolve("x", bucket.publish("half", config))
    with pytest.raises(AdapterRefused, match="pickle"):
        store.resolve("x", bucket.publish("pickle", {**config, "adapter_model.bin": b"\x80\x04."}))
    assert not bucket.proxy.requests("GET /" + bucket.name + "/pickle/adapter_model.bin")


def test_files_too_large_are_not_fetched(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    with pytest.raises(AdapterRefused, match="70000 bytes; at most 1000"):
        bucket.source(tmp_path, max_bytes=1000).resolve("shout", ref)
    store = bucket.source(tmp_path)
    resolved = store.resolve("shout", ref)
    with pytest.raises(AdapterRefused, match="70000 bytes; at most 1000"):
        bucket.source(tmp_path / "b").fetch(resolved, max_weights_bytes=1000)
    assert len(bucket.proxy.requests(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}")) == 1


def test_failures_that_pass_are_tried_again(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    bucket.proxy.fail(Fault("HEAD", status=503), Fault(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}", cut=0.5))
    store = bucket.source(tmp_path)
    assert store.fetch(store.resolve("shout", ref)).weights.numpy().tobytes() == FILES[WEIGHTS_FILE]


def test_failures_that_stay_end_soon_and_are_answered_at_once_then(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, negative_ttl_s=2.0)
    look = f"HEAD /{bucket.name}/shout/{CONFIG_FILE}"
    bucket.proxy.fail(*[Fault(look, status=500)] * 3)
    for name in ("one", "two"):
        with pytest.raises(AdapterUnavailable, match=bucket.name) as failed:
            store.resolve(name, ref)
        assert failed.value.adapter == name
    assert len(bucket.proxy.requests(look)) == 3
    assert (store.stats().remembered_failures, store.stats().failures_repeated) == (1, 1)
    time.sleep(2.05)
    assert store.resolve("three", ref).digest


def test_a_silent_server_is_given_up_on(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    bucket.proxy.fail(*[Fault(f"HEAD /{bucket.name}/shout/{CONFIG_FILE}", delay_s=20)] * 2)
    started = time.monotonic()
    with pytest.raises(AdapterUnavailable, match=r"could not be read \(\w*Timeout\w*\)"):
        bucket.source(tmp_path, timeout_s=0.3, retries=1).resolve("shout", ref)
    assert time.monotonic() - started < 10


def test_what_is_asked_about_an_adapter_is_asked_at_the_same_time(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, timeout_s=30.0, retries=0)
    for parties in (3, 2, 2, 2):  # to look up; to begin a download, to read both files, and to see that they still are
        bucket.proxy.fail(*[Fault(f"/{bucket.name}", meeting=threading.Barrier(parties))] * parties)
    assert store.fetch(store.resolve("shout", ref)).weights.numpy().tobytes() == FILES[WEIGHTS_FILE]
    assert len(bucket.proxy.requests(bucket.name)) == 9


def test_a_download_has_a_deadline(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    bucket.proxy.fail(*[Fault(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}", delay_s=20)] * 5)
    started = time.monotonic()
    with pytest.raises(AdapterUnavailable):
        bucket.source(tmp_path, retries=10, timeout_s=5.0, download_timeout_s=1.0).resolve("shout", ref)
    assert time.monotonic() - started < 10


def test_an_outage_keeps_the_last_known_content(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, refresh_s=0.0, retries=2)
    before = store.resolve("shout", ref)
    bucket.proxy.fail(Fault("HEAD", status=503))
    assert store.resolve("shout", ref) == before
    bucket.proxy.open_to = set()  # but what was closed is closed
    time.sleep(0.25)
    with pytest.raises(AdapterNotFound):
        store.resolve("shout", ref)


def test_altered_content_is_fetched_once_more_and_never_comes_through(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    resolved = bucket.source(tmp_path / "a").resolve("shout", ref)
    damaged = Fault(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}", corrupt=True)
    bucket.proxy.fail(damaged, damaged)
    with pytest.raises(AdapterUnavailable, match="Checksum"):  # the server's own checksum told
        bucket.source(tmp_path / "b", retries=1).fetch(resolved)
    bucket.proxy.pass_checksums = False
    bucket.proxy.fail(damaged)
    assert bucket.source(tmp_path / "c").fetch(resolved).digest() == resolved.digest
    bucket.proxy.fail(damaged, damaged)
    with pytest.raises(AdapterChanged):
        bucket.source(tmp_path / "d").fetch(resolved)
    assert not DiskCache(tmp_path / "d/cache", 0).sizes()


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path)
    bucket.proxy.fail(Fault(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}", delay_s=1.0))
    with ThreadPoolExecutor(1) as pool:
        resolving = pool.submit(store.resolve, "shout", ref)
        deadline = time.monotonic() + 20
        while not bucket.proxy.requests(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        bucket.publish("shout", {**NEW, CONFIG_FILE: b'{"peft_type": "LORA", "r": 8}'})
        resolved = resolving.result()
    files = store.fetch(resolved)
    assert (files.config, files.weights.numpy().tobytes()) == (b'{"peft_type": "LORA", "r": 8}', NEW[WEIGHTS_FILE])


def test_credentials_come_from_the_environment_and_can_be_rotated(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.proxy.open_to = {"AKIA-ACME"}
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, refresh_s=0.0)
    store.resolve("shout", ref)
    bucket.proxy.open_to = {"AKIA-NEXT"}
    with pytest.raises(AdapterNotFound, match=r"store\.sources"):
        store.resolve("shout", ref)
    monkeypatch.setenv("ACME_KEY", "AKIA-NEXT")
    time.sleep(0.25)
    assert store.resolve("shout", ref).digest
    monkeypatch.delenv("ACME_SECRET")
    with pytest.raises(AdapterUnavailable, match="ACME_SECRET"):
        bucket.source(tmp_path / "b").resolve("shout", ref)


def test_access_that_was_taken_away_is_noticed_although_the_content_is_here(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, refresh_s=0.2)
    resolved = store.resolve("shout", ref)
    store.resolve("shout", resolved.ref)
    bucket.proxy.open_to = set()
    time.sleep(0.25)
    again = bucket.source(tmp_path)
    for one in (store, again):
        for asked in (ref, resolved.ref):
            with pytest.raises(AdapterNotFound):
                one.resolve("shout", asked)
    bucket.proxy.open_to = None
    bucket.proxy.fail(*[Fault("HEAD", status=503)] * 99)
    time.sleep(0.25)
    for one in (store, again, bucket.source(tmp_path, retries=0)):  # and an outage does not open it again
        for asked in (ref, resolved.ref):
            with pytest.raises(AdapterUnavailable):
                one.resolve("shout", asked)


def test_a_pinned_adapter_on_this_machine_is_served_while_the_store_is_down(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path)
    pinned = store.resolve("shout", store.resolve("shout", ref).ref)
    bucket.proxy.fail(*[Fault("HEAD", status=503)] * 99)
    assert bucket.source(tmp_path).resolve("shout", pinned.ref) == pinned
    with pytest.raises(AdapterUnavailable):
        bucket.source(tmp_path, retries=0).resolve("shout", ref)  # what the prefix means now, nobody knows


def test_credentials_are_in_no_message_no_log_and_no_repr(
    bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path, refresh_s=0.0)
    bucket.proxy.fail(Fault("HEAD", status=503), Fault("GET", cut=0.5))
    store.fetch(store.resolve("shout", ref))
    bucket.proxy.open_to = set()
    with pytest.raises(AdapterNotFound) as failed:
        store.resolve("shout", ref)
    assert caplog.text
    seen = [headers for _, _, headers in bucket.proxy.seen]
    assert any(headers.get("x-amz-security-token") == SESSION for headers in seen)  # it was really used
    everything = caplog.text + repr(
        (failed.value, failed.value.__cause__, store, vars(store), vars(store._client), store._settings, store.stats())
    )
    everything += repr(pickle.dumps((failed.value, store._settings)))
    for secret in (SECRET, SESSION, "AKIA-ACME"):
        assert secret not in everything


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(fsspec.registry._registry if hasattr(fsspec.registry, "_registry") else {}, "gs", raising=False)
    settings = StoreSettings(root=tmp_path)
    store = RemoteSource(settings, ObjectClient(settings), DiskCache(tmp_path / "cache", 1 << 30))
    with pytest.raises(AdapterRefused, match=r"pip install lorafleet\[gs\]"):
        store.resolve("x", AdapterRef.parse("gs://acme/shout"))
    with pytest.raises(AdapterRefused, match=r"no scheme 'nosuch'.* s3://"):
        store.resolve("x", AdapterRef.parse("nosuch://acme/shout"))


def test_threads_share_one_look_up_and_one_download(bucket: Bucket, tmp_path: Path) -> None:
    ref = bucket.publish("shout")
    store = bucket.source(tmp_path)
    bucket.proxy.fail(Fault("HEAD", delay_s=0.3), Fault(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}", delay_s=0.3))
    gate = threading.Barrier(6)

    def one(number: int) -> str:
        gate.wait()
        return store.fetch(store.resolve(f"name{number}", ref)).digest()

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(one, range(6)))) == 1
    assert len(bucket.proxy.requests(f"GET /{bucket.name}/shout/{WEIGHTS_FILE}")) == 1


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_file_system_of_fsspec(tmp_path: Path, scheme: str) -> None:
    place = f"memory://acme-{uuid.uuid4().hex}" if scheme == "memory" else f"file://{tmp_path}/elsewhere"
    system, root = fsspec.core.url_to_fs(place)

    def publish(files: Mapping[str, bytes]) -> None:
        system.makedirs(f"{root}/shout", exist_ok=True)
        for name, data in files.items():
            system.pipe_file(f"{root}/shout/{name}", data)

    publish(FILES)
    settings = StoreSettings(root=tmp_path, hub_refresh_s=0.0, hub_retries=0)
    store = RemoteSource(settings, ObjectClient(settings), DiskCache(tmp_path / "cache", 1 << 30))
    ref = AdapterRef.parse(f"{place}/shout")
    old = store.resolve("shout", ref)
    assert store.fetch(old).weights.numpy().tobytes() == FILES[WEIGHTS_FILE]
    time.sleep(0.02)
    publish(NEW)
    new = store.resolve("shout", ref)
    assert store.fetch(new).weights.numpy().tobytes() == NEW[WEIGHTS_FILE]
    with pytest.raises(AdapterNotFound):
        store.resolve("x", AdapterRef.parse(f"{place}/nothing"))

"""The disk cache among threads and real processes that come, go and die."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapter_store import disk_cache
from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterRefused, AdapterUnavailable
from adapter_store.file_lock import file_lock
from adapter_store.load_stats import DiskCacheStats
from adapter_store.remote_source import RemoteSource
from adapter_store.source import AdapterRef
from tests.adapter_store.fetching import Fetcher, hub_source, lock_holder
from tests.adapter_store.hub_server import Fault, HubServer

FILES = {CONFIG_FILE: b'{"peft_type": "LORA"}', WEIGHTS_FILE: b"weights" * 10_000}
SIZE = sum(map(len, FILES.values()))
KEY = "0" * 64


def source(hub: HubServer, root: Path, **changes: object) -> RemoteSource:
    return hub_source(hub.endpoint, root, hub_timeout_s=90, hub_retries=0, **changes)


def fill(cache: DiskCache, number: int, size: int = SIZE) -> str:
    """Put in an entry of this many bytes, as a download does."""
    key = f"{number:064x}"
    with cache.exclusive(key, 10) as folder:
        (folder / CONFIG_FILE).write_bytes(FILES[CONFIG_FILE])
        (folder / WEIGHTS_FILE).write_bytes(number.to_bytes(8, "little") + bytes(size - len(FILES[CONFIG_FILE]) - 8))
        digest = CheckpointFiles.read(folder, "x").digest()
        cache.adopt(digest, folder)
    return digest


def wait_for(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_processes_download_an_adapter_once(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(Fault("/cdn/", delay_s=1.5))  # long enough for all of them to want it
    fetchers = [Fetcher(hub.endpoint, tmp_path, ["hub:acme/shout"]) for _ in range(4)]
    assert len({digest for fetcher in fetchers for digest in fetcher.digests()}) == 1
    assert len(hub.requests("/cdn/")) == 1


def test_a_process_killed_in_mid_download_holds_up_nobody_and_leaves_nothing(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(Fault("/cdn/", delay_s=60))
    victim = Fetcher(hub.endpoint, tmp_path, ["hub:acme/shout"])
    wait_for(lambda: hub.requests("/cdn/"))
    assert list((tmp_path / "cache").glob(f".incoming-*/{CONFIG_FILE}"))  # half of it is there
    victim.kill()
    started = time.monotonic()
    store = source(hub, tmp_path)
    resolved = store.resolve("shout", AdapterRef.parse("hub:acme/shout"))
    assert store.fetch(resolved).weights.numpy().tobytes() == FILES[WEIGHTS_FILE]
    assert time.monotonic() - started < 20
    assert list((tmp_path / "cache").glob(".*")) == []


def test_what_a_killed_process_left_goes_although_nobody_asks_for_it_again(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.publish("acme/other", {**FILES, WEIGHTS_FILE: b"other"})
    hub.fail(Fault("/cdn/", delay_s=60))
    victim = Fetcher(hub.endpoint, tmp_path, ["hub:acme/shout"])
    wait_for(lambda: hub.requests("/cdn/"))
    victim.kill()
    store = source(hub, tmp_path)
    store.fetch(store.resolve("other", AdapterRef.parse("hub:acme/other")))
    assert list((tmp_path / "cache").glob(".*")) == []


def test_a_download_under_way_is_left_alone(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20)
    with cache.exclusive(KEY, 1) as folder:
        (folder / CONFIG_FILE).write_bytes(b"half")
        fill(DiskCache(tmp_path, 1 << 20), 1)
        assert (folder / CONFIG_FILE).read_bytes() == b"half"
    assert not folder.exists()


def test_who_waits_too_long_for_another_process_is_told(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/shout", FILES)
    hub.fail(Fault("/cdn/", delay_s=3))
    slow = Fetcher(hub.endpoint, tmp_path, ["hub:acme/shout"])
    wait_for(lambda: hub.requests("/cdn/"))
    store = source(hub, tmp_path, hub_download_timeout_s=0.5)
    with pytest.raises(AdapterUnavailable, match="another process"):
        store.fetch(store.resolve("shout", AdapterRef.parse("hub:acme/shout")))
    assert len(slow.digests()) == 1
    assert len(hub.requests("/cdn/")) == 1


def test_many_adapters_come_at_once(hub: HubServer, tmp_path: Path) -> None:
    refs = [f"hub:acme/a{number}" for number in range(12)]
    for ref in refs:
        hub.publish(ref.removeprefix("hub:"), {**FILES, WEIGHTS_FILE: ref.encode()})
    hub.fail(*[Fault("/cdn/", delay_s=1.0)] * 12)
    store = source(hub, tmp_path)
    started = time.monotonic()
    with ThreadPoolExecutor(12) as pool:
        digests = list(pool.map(lambda ref: store.fetch(store.resolve(ref, AdapterRef.parse(ref))).digest(), refs))
    assert len(set(digests)) == 12
    assert time.monotonic() - started < 9


def test_the_budget_holds_while_processes_fill_the_cache(hub: HubServer, tmp_path: Path) -> None:
    budget = 3 * SIZE + SIZE // 2
    refs = [f"hub:acme/a{number}" for number in range(8)]
    for number, ref in enumerate(refs):
        hub.publish(ref.removeprefix("hub:"), {**FILES, WEIGHTS_FILE: bytes([number]) * len(FILES[WEIGHTS_FILE])})
    fetchers = [Fetcher(hub.endpoint, tmp_path, refs[n:] + refs[:n], budget) for n in (0, 3, 5)]
    cache, seen = DiskCache(tmp_path / "cache", budget), [0]
    while any(fetcher.process.is_alive() for fetcher in fetchers):
        seen.append(sum(cache.sizes().values()))
        time.sleep(0.005)
    assert [len(set(fetcher.digests())) for fetcher in fetchers] == [8, 8, 8]
    assert SIZE < max(seen) <= budget


def test_what_the_disk_holds_is_told_whoever_brought_it(tmp_path: Path) -> None:
    cache, other = DiskCache(tmp_path, 3 * SIZE), DiskCache(tmp_path, 3 * SIZE)
    assert cache.stats() == DiskCacheStats(0, 0, 3 * SIZE)
    for number in range(3):
        fill(cache if number else other, number)
        assert cache.stats() == other.stats() == DiskCacheStats(number + 1, (number + 1) * SIZE, 3 * SIZE)
    fill(other, 3, SIZE // 2)
    assert cache.stats() == DiskCacheStats(3, 2 * SIZE + SIZE // 2, 3 * SIZE)


def test_to_tell_what_the_disk_holds_takes_one_look_at_each_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DiskCache(tmp_path, 1 << 30)
    for number in range(3):
        fill(DiskCache(tmp_path, 1 << 30), number)
    looked: list[str] = []
    look, listing = disk_cache._size, Path.iterdir
    monkeypatch.setattr(disk_cache, "_size", lambda folder: looked.append(folder.name) or look(folder))
    monkeypatch.setattr(Path, "iterdir", lambda path: looked.append(path.name) or listing(path))
    os.utime(tmp_path, ns=(0, time.time_ns() - 10**9))  # what is there has been there for a while
    assert cache.stats().adapters == 3
    assert sorted(looked) == sorted([tmp_path.name, *2 * list(cache.sizes())])
    looked.clear()
    assert cache.stats().adapters == 3 and not looked
    new = fill(DiskCache(tmp_path, 1 << 30), 3)
    looked.clear()
    assert cache.stats().adapters == 4
    assert looked == [tmp_path.name, new, new]


def test_an_adapter_larger_than_the_budget_is_served_but_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.publish("acme/small", {**FILES, WEIGHTS_FILE: b"small"})
    hub.publish("acme/shout", FILES)
    store = source(hub, tmp_path, cache_bytes=SIZE // 2)
    for name in ("small", "shout"):
        files = store.fetch(store.resolve(name, AdapterRef.parse(f"hub:acme/{name}")))
    assert files.nbytes == SIZE
    assert list(DiskCache(tmp_path / "cache", 0).sizes().values()) == [len(FILES[CONFIG_FILE]) + 5]


def test_readers_never_see_half_of_what_is_being_removed(tmp_path: Path) -> None:
    """One that reads while another makes room gets all or nothing, never a refusal."""
    cache, stop = DiskCache(tmp_path, 2 * SIZE), threading.Event()
    digests = [fill(DiskCache(tmp_path / "spare", 1 << 30), number) for number in range(4)]

    def churn() -> None:
        number = 0
        while not stop.is_set():
            fill(cache, number % 4)
            number += 1

    whole = missing = 0
    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        try:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                for digest in digests:
                    files = cache.read(digest, "x", None)
                    assert files is None or files.nbytes == SIZE
                    whole += files is not None
                    missing += files is None
        finally:
            stop.set()
        churning.result()
    assert whole and missing


def test_an_entry_that_went_and_came_back_while_it_was_read_is_neither_refused_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read = DiskCache(tmp_path, SIZE), CheckpointFiles.read
    digest = fill(cache, 1)

    def overtaken(*arguments: Any) -> CheckpointFiles:
        monkeypatch.undo()
        fill(cache, 2)  # there is room for one
        try:
            return read(*arguments)
        finally:
            fill(cache, 1)

    monkeypatch.setattr(CheckpointFiles, "read", overtaken)
    assert cache.read(digest, "x", None) is None
    assert cache.holds(digest)
    files = cache.read(digest, "x", None)
    assert files is not None and files.nbytes == SIZE


def test_a_damaged_entry_is_removed_and_a_smaller_limit_is_not_damage(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1 << 20)
    digest = fill(cache, 1)
    with pytest.raises(AdapterRefused, match="at most 10"):
        cache.read(digest, "x", 10)
    assert cache.holds(digest)
    for damage in (lambda file: file.write_bytes(b"bit rot"), lambda file: file.unlink()):
        fill(cache, 1)
        damage(tmp_path / digest / WEIGHTS_FILE)
        assert cache.read(digest, "x", None) is None
        assert not cache.holds(digest)


def test_threads_and_processes_exclude_each_other(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [], []

    def hold() -> None:
        for _ in range(30):
            with file_lock(path, 30):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(hold) for _ in range(4)]:
            future.result()
    assert max(most) == 1 and len(most) == 120
    assert not path.exists()  # locks do not pile up
    with file_lock(path, 0), pytest.raises(TimeoutError), file_lock(path, 0.05):
        pass


def test_a_lock_file_that_was_let_go_of_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file before its holder removed it must not think that it has the lock."""
    real, opened = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not opened:  # between our opening the file and locking it, its holder lets go and another takes it
            opened.append(descriptor)
            (tmp_path / "lock").unlink()
            other = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
            opened.append(other)
            real(other, fcntl.LOCK_EX)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(TimeoutError), file_lock(tmp_path / "lock", 0.05):
        pass
    os.close(opened[1])
    with file_lock(tmp_path / "lock", 1):
        pass


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    holder = lock_holder(tmp_path / "lock")
    with pytest.raises(TimeoutError), file_lock(tmp_path / "lock", 0.1):
        pass
    holder.kill()
    holder.join(10)
    with file_lock(tmp_path / "lock", 5):
        pass

"""Other processes of the same machine that fetch adapters, started without importing everything anew."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterError
from adapter_store.file_lock import file_lock
from adapter_store.hub_client import HubClient
from adapter_store.remote_source import RemoteSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.adapter_store.fetching"])


class Fetcher:
    """A process that fetches references one after the other, on the disk cache in ``root``.

    undaunted: again and again, whatever fails, until it is killed.
    """

    def __init__(
        self, endpoint: str, root: Path, refs: Sequence[str], budget: int = 1 << 30, *, undaunted: bool = False
    ) -> None:
        self._reads, writes = _processes.Pipe(duplex=False)
        work = _fetch_on if undaunted else _fetch
        self.process: BaseProcess = _processes.Process(target=work, args=(endpoint, root, refs, budget, writes))
        self.process.start()
        writes.close()

    def kill(self) -> None:
        """As ``kill -9`` does."""
        self.process.kill()
        self.process.join(10)

    def digests(self) -> list[str]:
        """What it fetched, once it has ended."""
        self.process.join(60)
        assert self.process.exitcode == 0
        return self._reads.recv()


def _fetch(endpoint: str, root: Path, refs: Sequence[str], budget: int, answer: Connection) -> None:
    store = hub_source(endpoint, root, cache_bytes=budget, hub_timeout_s=90, hub_retries=0)
    answer.send([store.fetch(store.resolve(ref, AdapterRef.parse(ref))).digest() for ref in refs])


def _fetch_on(endpoint: str, root: Path, refs: Sequence[str], budget: int, answer: Connection) -> None:
    del answer  # there is no end
    store = hub_source(endpoint, root, cache_bytes=budget, hub_retries=0)
    for ref in itertools.cycle(refs):
        try:
            store.fetch(store.resolve(ref, AdapterRef.parse(ref)))
        except AdapterError:
            time.sleep(0.01)


def hub_source(endpoint: str, root: Path, **changes: object) -> RemoteSource:
    """The Hub at ``endpoint``, impatiently, with a disk cache in ``root``."""
    values = {"hub_timeout_s": 2.0, "hub_retries": 2, "hub_refresh_s": 60.0, "negative_ttl_s": 0.2} | changes
    settings = StoreSettings(root=root, hub_endpoint=endpoint, **values)  # type: ignore[arg-type]
    return RemoteSource(settings, HubClient(settings), DiskCache(root / "cache", settings.cache_bytes))


def lock_holder(path: Path) -> BaseProcess:
    """A process that holds a lock until it is killed; returns when it does."""
    reads, writes = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_hold, args=(path, writes))
    process.start()
    writes.close()
    assert reads.poll(30) and reads.recv() == "held"
    return process


def _hold(path: Path, answer: Connection) -> None:
    with file_lock(path, 1):
        answer.send("held")
        multiprocessing.Event().wait()

"""Brings adapters to host memory beside the step loop, so that only the requests that need them wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from adapter_store.errors import AdapterError, AdapterUnavailable
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from adapter_store.store import AdapterStore
from engine.sequence import Sequence

_log = logging.getLogger(__name__)
_Key = tuple[str, str | None]  # the name asked for, and the digest if the caller resolved it


class AdapterLoads:
    """Loads under way and who waits for them. Called from the step loop's thread only.

    What is on this machine is loaded in threads of its own, so that it never waits for downloads. Requests for the same
    adapter share one thread, so that a source which does not answer holds one of those for downloads.
    """

    def __init__(
        self,
        store: AdapterStore,
        slots: SlotPool,
        threads: int,
        download_threads: int,
        post: Callable[[Callable[[], None]], None],
        loaded: Callable[[Sequence], None],
        failed: Callable[[Sequence, Exception], None],
    ) -> None:
        """post: runs a function on the step loop's thread. loaded, failed: called there, for each sequence."""
        self._store = store
        self._slots = slots
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter-load")
        self._downloads = ThreadPoolExecutor(download_threads, thread_name_prefix="adapter-download")
        self._post = post
        self._loaded = loaded
        self._failed = failed
        self._waiting: dict[_Key, list[Sequence]] = {}
        self._fetches: dict[_Key, list[Callable[[PackedAdapter | Exception], None]]] = {}
        #: Sequences whose adapter is on its way. Any thread may read it.
        self.waiting = 0
        cache_bytes, slot_bytes = store.host_cache.budget_bytes, slots.arena.nbytes
        if cache_bytes < slot_bytes:
            _log.warning(
                "store.host_cache_bytes is %d but the adapter slots hold %d bytes: an adapter that leaves its slot may "
                "be read from its source again, and cannot be while that is down; raise it to %d or more",
                cache_bytes,
                slot_bytes,
                slot_bytes,
            )

    def start(self, sequence: Sequence) -> None:
        """Have ``loaded`` or ``failed`` called for the sequence.

        At once when its adapter is in host memory, or in a slot: ``sequence.adapter`` stays None then.
        """
        request = sequence.request
        assert request.adapter is not None
        if request.adapter_digest is not None:
            sequence.adapter = self._store.host_cache.get(request.adapter_digest)
            if sequence.adapter is not None or self._slots.find(request.adapter_digest) is not None:
                self._loaded(sequence)
                return
        self.waiting += 1
        key = (request.adapter, request.adapter_digest)
        under_way = self.loading(key)
        self._waiting.setdefault(key, []).append(sequence)
        if not under_way:
            self._threads.submit(self._begin, key)

    def fetch(self, name: str, digest: str | None, done: Callable[[PackedAdapter | Exception], None]) -> None:
        """Bring an adapter to host memory for nobody in particular; ``done`` is called with it, or with the error."""
        key = (name, digest)
        under_way = self.loading(key)
        self._fetches.setdefault(key, []).append(done)
        if not under_way:
            self._threads.submit(self._begin, key)

    def loading(self, key: _Key) -> bool:
        """Whether a load of exactly this is under way."""
        return key in self._waiting or key in self._fetches

    def digests(self) -> set[str]:
        """The content that is on its way, as far as it is known."""
        return {digest for _, digest in (*self._waiting, *self._fetches) if digest is not None}

    def drop(self, sequence: Sequence) -> bool:
        """Forget an aborted sequence; False when it does not wait here. Its load goes on, for the host cache."""
        for sequences in self._waiting.values():
            if sequence in sequences:
                sequences.remove(sequence)
                self.waiting -= 1
                return True
        return False

    def close(self) -> None:
        """Start no more loads. Threads at work end with their load."""
        for threads in (self._threads, self._downloads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, key: _Key) -> None:
        """In a thread: load what is on this machine, leave the rest to the threads for downloads."""
        try:
            if not self._store.at_hand(*key):
                self._downloads.submit(self._load, key)
                return
        except Exception as error:  # told to everyone who waits for it, as in _load
            self._post(partial(self._finish, key, error))
        else:
            self._load(key)

    def _load(self, key: _Key) -> None:
        try:
            outcome: PackedAdapter | Exception = self._store.load(*key)
        except Exception as error:
            outcome = error
        self._post(partial(self._finish, key, outcome))

    def _finish(self, key: _Key, outcome: PackedAdapter | Exception) -> None:
        for done in self._fetches.pop(key, ()):
            done(outcome)
        sequences = self._waiting.pop(key, [])
        self.waiting -= len(sequences)
        for sequence in sequences:
            if isinstance(outcome, Exception):
                self._failed(sequence, as_adapter_error(key[0], outcome))
            else:
                sequence.adapter, sequence.digest = outcome, outcome.digest
                self._loaded(sequence)


def as_adapter_error(name: str, error: Exception) -> Exception:
    """What a load ended with, as its client should see it."""
    if isinstance(error, AdapterError):
        return error
    unavailable = AdapterUnavailable(name, f"loading it failed: {type(error).__name__}: {error}")
    unavailable.__cause__ = error
    return unavailable

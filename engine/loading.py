"""Brings adapters to host memory beside the step loop, so that only the requests that need them wait."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from adapter_store.errors import AdapterChanged, AdapterError, AdapterUnavailable
from adapter_store.fair_threads import FairThreads
from adapter_store.host_cache import HostMemoryFull, Room
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from adapter_store.store import AdapterStore
from engine.sequence import Sequence
from engine.waiting import LAST, Order, WaitingQueue

_log = logging.getLogger(__name__)
_Key = tuple[str, str | None]  # the name asked for, and the digest if the caller resolved it


@dataclass(slots=True, eq=False)
class _Load:
    """One adapter on its way, and who waits for it. needs: bytes of host memory that it waits for, None while a thread
    is at work."""

    key: _Key
    sequences: list[Sequence] = field(default_factory=list)
    fetches: list[Callable[[PackedAdapter | Exception], None]] = field(default_factory=list)
    needs: int | None = None


class AdapterLoads:
    """Loads under way and who waits for them. Called from the step loop's thread only.

    What is on this machine is loaded in threads of its own, so that it never waits for downloads. Requests for the same
    adapter share one thread, so that a source which does not answer holds one of those for downloads.

    A load that finds no room in host memory ends there and is begun again once there is, in the order of the waiting
    queue: while any waits, nobody else gets room. It may take the room of those behind it in the queue, which then wait
    in turn, but not of those before it. So whoever is first gets room as soon as no copy and no load uses it, and
    since those who have room need nothing but a slot, nobody waits for somebody who waits for them.
    """

    def __init__(
        self,
        store: AdapterStore,
        slots: SlotPool,
        waiting: WaitingQueue,
        threads: int,
        download_threads: int,
        post: Callable[[Callable[[], None]], None],
        loaded: Callable[[Sequence], None],
        failed: Callable[[Sequence, Exception], None],
    ) -> None:
        """waiting: the scheduler's queue, which ``loaded`` sequences go to. post: runs a function on the step loop's
        thread. loaded, failed: called there, for each sequence."""
        self._store = store
        self._host = store.host_cache
        self._slots = slots
        self._queue = waiting
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter-load")
        # A source (a Hub organisation, a bucket) that does not answer leaves three quarters to the others.
        self._downloads = FairThreads(download_threads, -(-download_threads // 4), "adapter-download")
        self._post = post
        self._loaded = loaded
        self._failed = failed
        self._loads: dict[_Key, _Load] = {}
        self._seen = -1  # releases of host memory when room was last looked for
        #: Sequences whose adapter is on its way. Any thread may read it.
        self.waiting = 0
        cache_bytes, slot_bytes = self._host.budget_bytes, slots.arena.nbytes
        if cache_bytes < slot_bytes:
            _log.warning(
                "store.host_cache_bytes is %d but the adapter slots hold %d bytes: an adapter that leaves its slot may "
                "be read from its source again, and cannot be while that is down; raise it to %d or more",
                cache_bytes,
                slot_bytes,
                slot_bytes,
            )

    @property
    def unblocked(self) -> bool:
        """Whether some wait for host memory, and there may be some now."""
        return self._host.waited_only and self._seen != self._host.releases

    def start(self, sequence: Sequence) -> None:
        """Have ``loaded`` or ``failed`` called for the sequence.

        At once when its adapter is in a slot (``sequence.adapter`` stays None then) or in host memory.
        """
        request = sequence.request
        assert request.adapter is not None
        assert sequence.adapter is None
        if sequence.digest is not None:
            if self._slots.find(sequence.digest) is None:
                sequence.adapter = self._host.acquire(sequence.digest)
            if sequence.adapter is not None or self._slots.find(sequence.digest) is not None:
                self._loaded(sequence)
                return
        self.waiting += 1
        self._join((request.adapter, sequence.digest)).sequences.append(sequence)

    def fetch(self, name: str, digest: str | None, done: Callable[[PackedAdapter | Exception], None]) -> None:
        """Bring an adapter to host memory for no request; ``done`` is called with a reference to it, or with the error.
        Where host memory is full, after all requests."""
        packed = None if digest is None else self._host.acquire(digest)
        if packed is not None:
            done(packed)
        else:
            self._join((name, digest)).fetches.append(done)

    def digests(self) -> set[str]:
        """The content that is on its way, as far as it is known."""
        return {digest for _, digest in self._loads if digest is not None}

    def drop(self, sequence: Sequence) -> bool:
        """Forget an aborted sequence; False when it does not wait here. Its load goes on, for the host cache, unless
        it waits for room itself."""
        for load in self._loads.values():
            if sequence in load.sequences:
                load.sequences.remove(sequence)
                self.waiting -= 1
                if load.needs is not None and not load.sequences and not load.fetches:
                    del self._loads[load.key]
                    self._keep_line()
                return True
        return False

    def settle(self) -> None:
        """Begin again what waited for host memory, as far as there is room now. Once a turn of the step loop."""
        if not self.unblocked:
            return
        self._seen = self._host.releases
        for load in sorted((load for load in self._loads.values() if load.needs is not None), key=self._order):
            assert load.needs is not None
            room = self._host.reserve(load.needs, waited=True) or self._room_of_those_behind(load, load.needs)
            if room is None:
                break
            load.needs = None
            self._threads.submit(self._begin, load.key, room)
        self._keep_line()

    def close(self) -> None:
        """Start no more loads. Threads at work end with their load."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._downloads.close()

    def _join(self, key: _Key, needs: int | None = None) -> _Load:
        """The load of this key, begun if there is none, or left to wait for room if it is known how much it needs."""
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(key, needs=needs)
            if needs is None:
                self._threads.submit(self._begin, key, None)
        return load

    def _keep_line(self) -> None:
        self._host.waited_only = any(load.needs is not None for load in self._loads.values())

    def _order(self, load: _Load) -> Order:
        return min(map(self._queue.order, load.sequences), default=LAST)

    def _room_of_those_behind(self, load: _Load, nbytes: int) -> Room | None:
        """Room that sequences later in the queue have, if that makes enough of it; those wait for room again."""
        order = self._order(load)
        behind = [sequence for sequence in self._queue if sequence.adapter is not None]
        behind = [sequence for sequence in behind if self._queue.order(sequence) > order]
        loose = Counter(sequence.adapter.digest for sequence in behind if sequence.adapter is not None)
        named = self._host.holders(nbytes, loose)
        if not named:
            return None
        leaving = [sequence for sequence in behind if sequence.digest in named]
        for sequence in leaving:
            assert sequence.adapter is not None
            assert sequence.request.adapter is not None
            self._queue.remove(sequence)
            packed, sequence.adapter = sequence.adapter, None
            self._join((sequence.request.adapter, sequence.digest), packed.nbytes).sequences.append(sequence)
            self.waiting += 1
            self._host.release(packed)
        return self._host.reserve(nbytes, waited=True)

    def _begin(self, key: _Key, room: Room | None) -> None:
        """In a thread: load what is on this machine, leave the rest to the threads for downloads."""
        try:
            if not self._store.at_hand(*key):
                self._downloads.submit(self._store.owner(*key), self._load, key, room)
                return
        except Exception as error:  # told to everyone who waits for it, as in _load
            if room is not None:
                self._host.cancel(room)
            self._post(partial(self._finish, key, error))
        else:
            self._load(key, room)

    def _load(self, key: _Key, room: Room | None) -> None:
        try:
            outcome: PackedAdapter | Exception = self._store.load(*key, room)
        except Exception as error:
            outcome = error
        self._post(partial(self._finish, key, outcome))

    def _finish(self, key: _Key, outcome: PackedAdapter | Exception) -> None:
        if isinstance(outcome, HostMemoryFull):
            load = self._loads[key]
            if load.sequences or load.fetches:
                load.needs = outcome.nbytes
                self._seen = -1
            else:
                del self._loads[key]
            self._keep_line()
            return
        load = self._loads.pop(key)
        self.waiting -= len(load.sequences)
        if isinstance(outcome, Exception):
            for done in load.fetches:
                done(as_adapter_error(key[0], outcome))
            for sequence in load.sequences:
                if isinstance(outcome, AdapterChanged) and _may_be_resolved_again(sequence):
                    sequence.digest = None
                    sequence.page_keys.clear()
                    self.start(sequence)
                else:
                    self._failed(sequence, as_adapter_error(key[0], outcome))
            return
        for done in load.fetches:
            done(self._host.share(outcome))
        for sequence in load.sequences:
            sequence.adapter, sequence.digest = self._host.share(outcome), outcome.digest
            self._loaded(sequence)
        self._host.release(outcome)


def _may_be_resolved_again(sequence: Sequence) -> bool:
    """Whether nobody has been promised the content that its adapter's name meant when it came."""
    return sequence.request.adapter_digest is None and sequence.digest is not None and not sequence.preempted


def as_adapter_error(name: str, error: Exception) -> Exception:
    """What a load ended with, as its client should see it."""
    if isinstance(error, AdapterError):
        return error
    unavailable = AdapterUnavailable(name, f"loading it failed: {type(error).__name__}: {error}")
    unavailable.__cause__ = error
    return unavailable

"""What is asked of adapters beside requests: to be fetched ahead, pinned to a slot, unloaded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from adapter_store.errors import AdapterNotFound
from adapter_store.host_cache import HostCache
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from engine.kv_pages import PagePool
from engine.loading import AdapterLoads, as_adapter_error
from engine.output import fresh

T = TypeVar("T")


class ResidentAdapters:
    """Answers through futures, at once or when a slot or the last user of an adapter is free. The step loop's thread
    only."""

    def __init__(
        self,
        host_cache: HostCache,
        slots: SlotPool,
        pages: PagePool,
        loads: AdapterLoads,
        to_slot: Callable[..., bool],
        uses: Callable[[str], bool],
    ) -> None:
        """to_slot: ``SlotAssignment.to_slot``. uses: whether a request that is not finished needs the adapter."""
        self._host_cache = host_cache
        self._slots = slots
        self._pages = pages
        self._loads = loads
        self._to_slot = to_slot
        self._uses = uses
        self._open: list[Future[Any]] = []  # every question that is not answered
        self._pins: dict[str, tuple[PackedAdapter, list[Future[None]]]] = {}  # that wait for a slot
        self._unloads: list[tuple[str, Future[bool]]] = []  # that wait for the last user
        self.prefetches = 0

    def ask(self, question: Callable[[ResidentAdapters], None], answer: Future[Any]) -> None:
        """Put a question, and see that its answer is its exception when it raises."""
        self._open = [*(future for future in self._open if not future.done()), answer]
        try:
            question(self)
        except Exception as error:
            _answer(answer, error)

    def prefetch(self, name: str, digest: str | None, answer: Future[bool]) -> None:
        """To host memory, and to a slot if one can be had; answers whether it has one."""

        def loaded(outcome: PackedAdapter | Exception) -> None:
            if isinstance(outcome, Exception):
                _answer(answer, as_adapter_error(name, outcome))
                return
            self.prefetches += 1
            in_slot = self._to_slot(outcome)
            if not in_slot:
                self._host_cache.release(outcome)
            _answer(answer, in_slot)

        if digest is not None and self._slots.find(digest) is not None:
            _answer(answer, True)
            return
        self._loads.fetch(name, digest, loaded)

    def pin(self, digest: str, answer: Future[None]) -> None:
        """To a slot as soon as one is free, and to stay there. Raises AdapterNotFound, PinRefused."""
        slot = self._slots.find(digest)
        if slot is not None:
            self._slots.pin(slot)
            _answer(answer, None)
            return
        if digest in self._pins:
            self._pins[digest][1].append(answer)
            return
        packed = self._host_cache.acquire(digest)
        if packed is None:
            raise AdapterNotFound(digest[:12], "it is neither in a slot nor in host memory: prefetch it first")
        self._pins[digest] = packed, [answer]

    def unpin(self, digest: str, answer: Future[bool]) -> None:
        """Undo ``pin``, done or waiting."""
        waiting = self._pins.pop(digest, None)
        if waiting is not None:
            self._host_cache.release(waiting[0])
            for pin in waiting[1]:
                _answer(pin, AdapterNotFound(digest[:12], "it was unpinned before a slot was free for it"))
        _answer(answer, self._slots.unpin(digest) or waiting is not None)

    def unload(self, digest: str, answer: Future[bool], *, wait: bool) -> None:
        """Once nobody uses it: empty its slot, its place in host memory and the pages kept for its prompts.

        wait: until nobody does; else the answer is False at once.
        """
        if self._unloaded(digest, answer):
            return
        if wait:
            self._unloads.append((digest, answer))
        else:
            _answer(answer, False)

    def settle(self) -> None:
        """Do what waited and can be done now. Once a turn of the step loop."""
        for digest in list(self._pins):
            packed, answers = self._pins[digest]
            if not self._to_slot(packed, spare=False):
                continue
            del self._pins[digest]
            slot = self._slots.find(digest)
            assert slot is not None
            for answer in answers:
                try:
                    self._slots.pin(slot)
                    _answer(answer, None)
                except Exception as error:
                    _answer(answer, error)
        if self._unloads:
            self._unloads = [(digest, answer) for digest, answer in self._unloads if not self._unloaded(digest, answer)]

    def end(self, error: Exception) -> None:
        """The loop has ended: nothing more will be answered."""
        for answer in self._open:
            _answer(answer, fresh(error))

    def _unloaded(self, digest: str, answer: Future[bool]) -> bool:
        """Whether the question is done with, by its answer or because nobody waits for it any more."""
        if answer.cancelled():
            return True
        if self._uses(digest) or digest in self._loads.digests() or digest in self._pins:
            return False
        slot = self._slots.find(digest)
        if slot is not None and slot.refs:
            return False
        if not self._host_cache.remove(digest) and digest in self._host_cache.digests():
            return False  # a copy reads it still
        self._slots.remove(digest)
        self._pages.forget(digest)
        _answer(answer, True)
        return True


def _answer(future: Future[T], outcome: T | Exception) -> None:
    if future.done() or not future.set_running_or_notify_cancel():
        return  # answered before, or whoever asked has given up
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

"""A replica's adapters: who uses them, what is held of them, and letting go of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from adapter_store.errors import AdapterNotFound
from adapter_store.merging_recipe import Merge
from adapter_store.source import AdapterRef
from engine.engine import Engine

LATE_SECONDS = 2.0  # a request that was resolved before its adapter was unloaded arrives within this time
LAST_STEP_SECONDS = 2.0


class ReplicaAdapters:
    """Counts who uses which adapter, and does as the gateways say."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: Counter[str] = Counter()  # by digest
        self._ended = asyncio.Event()
        self._leaving: dict[str, float] = {}  # digest -> until when its requests are turned away (monotonic seconds)

    @contextmanager
    def used_by_request(self, adapter: str | None, digest: str | None, token: str | None = None) -> Iterator[None]:
        """Around one request. token: with which its adapter is read, where that has to come from its source.

        Raises AdapterNotFound while its adapter is being unloaded.
        """
        if digest is None:
            yield
            return
        if self._leaving.get(digest, 0.0) > time.monotonic():
            raise AdapterNotFound(adapter or digest, "it was unloaded just now")
        self._requests[digest] += 1
        try:
            with self._read_with(adapter, token):
                yield
        finally:
            self._requests[digest] -= 1
            if self._requests[digest] == 0:
                del self._requests[digest]
                self._ended.set()

    @contextmanager
    def _read_with(self, adapter: str | None, token: str | None) -> Iterator[None]:
        store = self._engine.parts.store
        with ExitStack() as lent:
            if store is not None and token and adapter:
                for ref in _hub_references(adapter):
                    lent.enter_context(store.catalog.sources.lend_token(ref, token))
            yield

    def held(self) -> dict[str, Any]:
        """``{"slots": {digest: rank}, "host": [digest], "requests": {digest: count}}``."""
        slots = self._engine.parts.slots
        return {
            "slots": {} if slots is None else dict(slots.residency().adapters),
            "host": list(self._engine.stats().host_cached),
            "requests": dict(self._requests),
        }

    async def prefetch(self, adapter: str, digest: str) -> None:
        """Bring the adapter here, so that no request waits for its source. Raises an AdapterError."""
        self._leaving.pop(digest, None)
        await self._engine.prefetch(adapter, digest)

    async def unload(self, digest: str, wait_s: float) -> bool:
        """Free everything that this replica keeps of the adapter; False when requests still used it after ``wait_s``.

        New requests for it are turned away meanwhile, and for a moment longer: they may be under way.
        """
        deadline = time.monotonic() + wait_s
        self._leaving[digest] = deadline + LATE_SECONDS
        while self._requests[digest] and time.monotonic() < deadline:
            self._ended.clear()
            try:
                await asyncio.wait_for(self._ended.wait(), deadline - time.monotonic())
            except TimeoutError:
                break
        freed = not self._requests[digest]
        # The engine lets go of a request in the step after its last one.
        freed = freed and await self._engine.unload(digest, max(LAST_STEP_SECONDS, deadline - time.monotonic()))
        if freed:
            self._leaving[digest] = time.monotonic() + LATE_SECONDS
        else:
            self._leaving.pop(digest, None)
        self._leaving = {one: until for one, until in self._leaving.items() if until > time.monotonic()}
        return freed


def _hub_references(adapter: str) -> list[AdapterRef]:
    """What of it is on the Hub and was named by where it is."""
    if Merge.is_meant(adapter):
        refs = [part.ref for part in Merge.parse(adapter).parts if part.by_reference and part.ref is not None]
        return [ref for ref in refs if ref.source == "hub"]
    return [AdapterRef.parse(adapter)] if adapter.startswith("hub:") else []

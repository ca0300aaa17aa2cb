"""Keeps adapters in the slots of one replica because an operator said so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterError, AdapterUnavailable
from deployments.background import end
from engine.engine import Engine

logger = logging.getLogger("ray.serve")


class PinKeeper:
    """Keeps what the wanted names mean in slots of this replica, also after they were published anew.

    A name is looked up when it is new, every ``refresh_s`` seconds, and when ``settle`` is called. The new content is
    in its slot before the old one may leave.
    """

    def __init__(self, engine: Engine, catalog: Catalog, wanted: Callable[[], list[str]], refresh_s: float) -> None:
        self._engine = engine
        self._catalog = catalog
        self._wanted = wanted
        self._refresh_s = max(1.0, refresh_s)
        self._held: dict[str, str] = {}  # name -> digest
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def changed(self) -> None:
        """The wanted names are others now."""
        self._wake.set()

    async def settle(self) -> dict[str, AdapterError]:
        """Make it so now. Returns why a name could not be kept, by name."""
        async with self._turn:
            wanted = self._wanted()
            for name in [name for name in self._held if name not in wanted]:
                await self._let_go(name)
            failed: dict[str, AdapterError] = {}
            for name in wanted:
                try:
                    await self._keep(name)
                except AdapterError as error:
                    failed[name] = error
                except (ValueError, RuntimeError) as error:  # no slot is left that could be kept
                    failed[name] = AdapterUnavailable(name, str(error))
            return failed

    async def close(self) -> None:
        """Stop looking after them."""
        await end(self._task)

    async def _keep(self, name: str) -> None:
        resolved = await asyncio.to_thread(self._catalog.resolve, name)
        if self._held.get(name) == resolved.digest:
            return
        await self._engine.prefetch(str(resolved.ref), resolved.digest)
        await self._engine.pin(resolved.digest)
        await self._let_go(name)
        self._held[name] = resolved.digest

    async def _let_go(self, name: str) -> None:
        digest = self._held.pop(name, None)
        if digest is not None and digest not in self._held.values():
            await self._engine.unpin(digest)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            for error in (await self.settle()).values():
                logger.warning("a pinned adapter is not in its slot: %s", error)
            try:
                await asyncio.wait_for(self._wake.wait(), self._refresh_s)
            except TimeoutError:
                continue

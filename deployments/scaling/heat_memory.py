"""Demand by adapter, where it outlasts every hub: in the key-value store of Ray's head."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import ray
from ray.serve._private.storage.kv_store import KVStoreError, RayInternalKVStore

from deployments.scaling.heat import HotAdapter, packed, unpacked

NAMESPACE = "lorafleet-heat"
MOST_KEPT = 4096  # adapters, about 130 bytes each
KEEP_SECONDS = 5.0


class HeatMemory:
    """One application's. Whoever keeps something has to have recalled what was kept before."""

    def __init__(self) -> None:
        self._kept_at = 0.0

    async def recall(self, application: str) -> list[HotAdapter]:
        """What was kept last, cooled down since; nothing where there is none, or no Ray."""
        if not ray.is_initialized():
            return []
        try:
            data = await asyncio.to_thread(lambda: RayInternalKVStore(NAMESPACE).get(application))
        except KVStoreError:
            return []
        return unpacked(data, time.time()) if data else []

    async def keep(self, application: str, hottest: Sequence[HotAdapter]) -> None:
        """Keep it instead of what was kept, unless that was less than ``KEEP_SECONDS`` ago."""
        now = time.monotonic()
        if not ray.is_initialized() or now - self._kept_at < KEEP_SECONDS:
            return
        self._kept_at = now
        data = packed(hottest[:MOST_KEPT], time.time())
        try:
            await asyncio.to_thread(lambda: RayInternalKVStore(NAMESPACE).put(application, data))
        except KVStoreError:
            return  # the next word is kept again

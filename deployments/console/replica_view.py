"""What one replica tells the console of itself."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.engine import Engine

MOST_SLOTS = 512  # told of; a replica with more has the rest counted


class ReplicaView:
    """Reads an engine. Cheap: once a second, while somebody looks."""

    def __init__(self, name: str, version: str, engine: Engine, draining: Callable[[], bool]) -> None:
        """version: of the code and settings that the replica was started with."""
        self._name = name
        self._version = version
        self._engine = engine
        self._draining = draining

    async def read(self) -> dict[str, Any]:
        """Plain numbers of now, and totals since the start. clock: this replica's own, for rates, in seconds.

        slots: [rank of the class, name, rank, requests, loaded, pinned, idle seconds] of each; an empty one has its
        class alone.
        """
        engine = self._engine
        stats, slots = engine.stats(), engine.parts.slots
        pictures = [] if slots is None else slots.pictures()
        return {
            "replica": self._name,
            "version": self._version,
            "node": platform.node(),
            "device": _device(None if slots is None else slots.device),
            "clock": time.monotonic(),
            "draining": self._draining(),
            "running": stats.running,
            "max_rows": engine.settings.max_rows,
            "waiting": stats.waiting,
            "waiting_for_adapter": stats.waiting_for_adapter,
            "longest_wait_s": stats.longest_wait_s,
            "tenants": list(stats.waiting_by_tenant),
            "waiting_tenants": stats.waiting_tenants,
            "pages": stats.num_pages,
            "free_pages": stats.free_pages,
            "host_adapters": len(stats.host_cached),
            "host_bytes": stats.host_bytes,
            "host_budget_bytes": stats.host_budget_bytes,
            "generated": stats.generated_tokens,
            "step_s": stats.last_step_seconds,
            "hits": stats.slot_hits,
            "misses": stats.slot_misses,
            "loads": 0 if slots is None else slots.stats().copies.done,
            "slots_in_use": stats.slots_in_use,
            "slots_filled": sum(one.digest is not None for one in pictures),
            "slots_total": len(pictures),
            "slots": [
                [one.class_rank]
                if one.digest is None
                else [
                    one.class_rank,
                    one.name or one.digest[:12],
                    one.rank,
                    one.refs,
                    one.loaded,
                    one.pinned,
                    round(one.idle_s, 1),
                ]
                for one in pictures[:MOST_SLOTS]
            ],
        }


def _device(device: torch.device | None) -> str:
    if device is None or device.type != "cuda":
        return "CPU"
    return torch.cuda.get_device_name(device)

"""What a gateway knows for the console: its replicas, their names for adapters, its own routing decisions."""

from __future__ import annotations

import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import metadata
from typing import Any

from adapter_store.catalog import Catalog
from adapter_store.references import parse_reference
from adapter_store.source import AdapterRef
from deployments.console.fleet_picture import FleetPicture
from deployments.console.snapshot_feed import SnapshotFeed
from deployments.replicas import Replicas

PATIENCE_SECONDS = 5.0  # for replicas to answer
_PACKAGES = ("lorafleet", "ray", "torch", "triton")


class Console:
    """One gateway's. ``feed`` is what pages look at."""

    def __init__(
        self,
        base_model: str,
        catalog: Catalog,
        replicas: Replicas,
        routing: Callable[[], Mapping[str, int]],
        states: Callable[[], Awaitable[Mapping[str, int]]],
    ) -> None:
        """routing: this process's decisions by reason. states: replicas by what Serve says of them, such as RUNNING,
        STARTING, STOPPING."""
        self._base_model = base_model
        self._catalog = catalog
        self._replicas = replicas
        self._routing = routing
        self._states = states
        self._versions = _versions()
        self._picture = FleetPicture(self._label)
        self.feed = SnapshotFeed(self.snapshot)

    async def snapshot(self) -> dict[str, Any]:
        """Everything that the page shows, of now. Raises ReplicaLost when a replica does not answer."""
        answers = await self._replicas.every("view", timeout_s=PATIENCE_SECONDS)
        picture = self._picture.take([answer["result"] for answer in answers if "result" in answer])
        return picture | {
            "time": time.time(),
            "base_model": self._base_model,
            "gateway": platform.node(),
            "routing": dict(self._routing()),
            "states": dict(await self._states()),
            "versions": self._versions,
        }

    def _label(self, name: str) -> str:
        """An adapter's name where ``name`` is its reference; other tenants go by what they call themselves."""
        if not AdapterRef.is_meant(name):
            return name
        try:
            return self._catalog.name_of(parse_reference(name)) or name
        except ValueError:
            return name


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # ours runs from its folder, too, and triton is not everywhere
            continue
    return versions

"""Carries residency news from replicas to every router: a replica publishes to the hub, and routers long-poll it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from deployments.board import Cursor
from deployments.hub import SERVE_NAMESPACE
from deployments.residency import ReplicaNews, ResidencyView

RETRY_SECONDS = 0.5
HEARTBEAT_SECONDS = 10.0

logger = logging.getLogger("ray.serve")


class ResidencyPublisher:
    """A replica's side: publishes what ``snapshot`` says whenever ``changed`` is called, and now and then.

    Reports that pile up while one is on its way are sent as one, the latest. ``find_hub`` is called again
    after an error, because Serve replaces a hub that died.
    """

    def __init__(self, snapshot: Callable[[int], ReplicaNews], find_hub: Callable[[], Any]) -> None:
        self._snapshot = snapshot
        self._find_hub = find_hub
        self._version = 0
        self._event = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def changed(self) -> None:
        """There is something new to tell. Call it on the loop that made this object."""
        self._version += 1
        self._event.set()

    async def close(self) -> None:
        """Publish once more and stop."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._version += 1
        try:
            await asyncio.wait_for(self._find_hub().publish.remote(self._snapshot(self._version)), 1.0)
        except (TimeoutError, RayError, ValueError):
            logger.info("the residency hub went away before this replica did")

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        hub: Any = None
        while True:
            self._event.clear()
            try:
                hub = hub or await loop.run_in_executor(None, self._find_hub)
                await hub.publish.remote(self._snapshot(self._version))
            except (RayError, ValueError) as error:
                logger.warning("residency news not delivered, trying again: %s", error)
                hub = None
                await asyncio.sleep(RETRY_SECONDS)
                self._event.set()
            try:
                await asyncio.wait_for(self._event.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                continue


async def watch_hub(name: str, view: ResidencyView) -> None:
    """Keep ``view`` up to date with the hub of this name until cancelled. Never raises on a lost hub."""
    loop = asyncio.get_running_loop()
    hub: Any = None
    cursor: Cursor | None = None
    while True:
        try:
            # Finding an actor by name blocks on the cluster's store, so not on the router's loop.
            hub = hub or await loop.run_in_executor(None, ray.get_actor, name, SERVE_NAMESPACE)
            cursor, reports = await hub.watch.remote(cursor)
        except (RayError, ValueError) as error:
            logger.info("no residency news for now: %s", error)
            hub = None
            await asyncio.sleep(RETRY_SECONDS)
            continue
        view.apply(reports)

"""Carries residency news from replicas to every router: a small actor that Serve keeps beside LoraReplica.

A replica publishes, the hub keeps the latest report of each, and routers long-poll it. Any process that can
reach the Ray cluster can watch, so a router in a proxy or in another application hears the same news.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from deployments.residency import ReplicaNews, ResidencyView

HUB_NAME = "residency"
SERVE_NAMESPACE = "serve"  # where Serve registers the actors it manages
WATCH_SECONDS = 20.0
RETRY_SECONDS = 0.5
FORGET_AFTER_SECONDS = 120.0
HEARTBEAT_SECONDS = 10.0

logger = logging.getLogger("ray.serve")


class ResidencyHub:
    """The latest report of every replica, with a long poll. One asyncio actor, no CPU reserved.

    A cursor is ``(epoch, sequence)``; a hub that Serve restarted has a new epoch, so a watcher that comes
    with an old one gets everything.
    """

    def __init__(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._sequence = 0
        self._reports: dict[str, tuple[int, float, ReplicaNews]] = {}  # replica -> (sequence, heard at, report)
        self._changed = asyncio.Condition()

    async def publish(self, report: ReplicaNews) -> None:
        """Keep this report unless a newer one of the same replica is known. A repeated one is a heartbeat."""
        now = time.monotonic()
        known = self._reports.get(report.replica)
        if known is not None and known[2].version >= report.version:
            self._reports[report.replica] = (known[0], now, known[2])
            return
        async with self._changed:
            self._sequence += 1
            self._reports[report.replica] = (self._sequence, now, report)
            for replica, (_, heard, _) in list(self._reports.items()):
                if now - heard > FORGET_AFTER_SECONDS:
                    del self._reports[replica]
            self._changed.notify_all()

    async def watch(
        self, cursor: tuple[str, int] | None = None, wait_s: float = WATCH_SECONDS
    ) -> tuple[tuple[str, int], list[ReplicaNews]]:
        """Reports newer than ``cursor``; waits up to ``wait_s`` seconds for one, then answers with none."""
        since = cursor[1] if cursor is not None and cursor[0] == self._epoch else 0
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._sequence > since), wait_s)
            except TimeoutError:
                return (self._epoch, self._sequence), []
        reports = [report for sequence, _, report in self._reports.values() if sequence > since]
        return (self._epoch, self._sequence), reports

    def name(self) -> str:
        """The name under which ``ray.get_actor`` finds this hub from any process of the cluster."""
        return ray.get_runtime_context().get_actor_name() or ""


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
    cursor: tuple[str, int] | None = None
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

"""The one place that every gateway, replica and router hears from: a small actor that Serve keeps beside LoraReplica.

It carries replicas' news to routers, and what was declared at run time to gateways and replicas. Any
process that can reach the Ray cluster can watch, so a router in a proxy or in another application hears the same news.

Nothing in here is on a disk. Serve starts a new hub when one dies, and whoever watched the old one tells the new one
what was declared. A change of ``args`` brings a hub of its own; it takes over what the one before it knows, and
follows that one for as long as it lives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.utils import get_deployment_actor_name

from deployments.adapters.declarations import Declaration, Declarations, stamped
from deployments.news.board import Board, Cursor
from deployments.news.message import ReplicaNews
from deployments.news.news_board import Answer, NewsBoard, Receipt
from deployments.scaling.heat import HeatTable, HotAdapter
from deployments.scaling.heat_memory import MOST_KEPT, HeatMemory

HUB_NAME = "fleet"
REPLICA_DEPLOYMENT = "LoraReplica"
HUB_METADATA = "news_hub"  # LoraReplica publishes its hub's actor name to routers under this key
SERVE_NAMESPACE = "serve"  # where Serve registers the actors it manages
WATCH_SECONDS = 20.0
SPREAD_SECONDS = 2.0


class FleetHub:
    """One asyncio actor, no CPU reserved."""

    def __init__(self) -> None:
        self._news = NewsBoard()
        self._heat = HeatTable()
        self._heat_memory = HeatMemory()
        self._heat_recalled = False
        self._board: Board[Declaration] = Board()
        self._declarations = Declarations()
        self._following: asyncio.Task[None] | None = None

    def name(self) -> str:
        """The name under which ``ray.get_actor`` finds this hub from any process of the cluster."""
        return (ray.get_runtime_context().get_actor_name() or "") if ray.is_initialized() else ""

    # -- news of replicas ----------------------------------------------------------------------------------

    async def publish(self, news: ReplicaNews) -> Receipt:
        """See ``NewsBoard``."""
        return self._news.publish(news)

    async def watch_news(self, reader: str, cursor: Cursor | None = None, wait_s: float = WATCH_SECONDS) -> Answer:
        """See ``NewsBoard``."""
        return await self._news.watch(reader, cursor, wait_s)

    # -- what a new replica is warmed up with ----------------------------------------------------------------

    async def tell_heat(self, replica: str, hottest: Sequence[HotAdapter]) -> None:
        """What a replica was asked for most."""
        await self._recall_heat()
        self._heat.tell(replica, hottest, time.monotonic())
        await self._heat_memory.keep(_application(self.name()), self._heat.hottest(MOST_KEPT, time.monotonic()))

    async def hottest(self, limit: int) -> tuple[list[HotAdapter], tuple[str, ...]]:
        """The adapters asked for most, also before this hub was made, and which replicas run."""
        await self._recall_heat()
        return self._heat.hottest(limit, time.monotonic()), self._news.alive

    async def _recall_heat(self) -> None:
        if not self._heat_recalled:
            before = await self._heat_memory.recall(_application(self.name()))
            if not self._heat_recalled:
                self._heat_recalled = True
                self._heat.tell("", before, time.monotonic())

    # -- declarations --------------------------------------------------------------------------------------

    async def declare(self, wanted: Declaration, known: Declaration) -> tuple[Declaration, bool]:
        """Put ``wanted`` in the place of ``known``, the latest word that the caller has heard.

        Returns the word that holds now (another one than wanted, with another stamp, when ``known`` was not the latest)
        and whether every watcher has taken it in.
        """
        await self.restore([known])  # after a restart the caller may know more than this hub
        latest = self._declarations.get(wanted.name)
        if latest.stamp != known.stamp:
            return latest, True
        made = stamped(wanted, time.time_ns(), self._declarations)
        sequence = await self._tell(made)
        return made, await self._board.spread(sequence, SPREAD_SECONDS)

    async def restore(self, declarations: Sequence[Declaration]) -> None:
        """Take in what a watcher of an earlier hub knows."""
        for one in declarations:
            if one.stamp > self._declarations.get(one.name).stamp:
                await self._tell(one)

    async def watch_declarations(
        self, reader: str, cursor: Cursor | None = None, wait_s: float = WATCH_SECONDS
    ) -> tuple[Cursor, list[Declaration]]:
        """Declarations newer than ``cursor``; waits up to ``wait_s`` seconds for one, then answers with none.

        ``declare`` waits for this reader to come back with the cursor it got."""
        if self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow_predecessors())
        return await self._board.watch(cursor, wait_s, reader)

    async def _tell(self, one: Declaration) -> int:
        self._declarations.merge([one])
        for name in self._declarations.forget_old(time.time_ns()):
            self._board.drop(name)
        return await self._board.put(one.name, one)

    async def _follow_predecessors(self) -> None:
        """Hear what hubs of this application's earlier versions hear, until they are gone."""
        if not ray.is_initialized():
            return
        names = await asyncio.get_running_loop().run_in_executor(None, _predecessors, self.name())
        await asyncio.gather(*map(self._follow, names))

    async def _follow(self, name: str) -> None:
        try:
            hub: Any = await asyncio.get_running_loop().run_in_executor(None, ray.get_actor, name, SERVE_NAMESPACE)
            cursor = None
            while True:
                cursor, news = await hub.watch_declarations.remote("", cursor)
                await self.restore(news)
        except (RayError, ValueError):
            return  # it is gone


def find_hub(app_name: str, code_version: str, *, any_version: bool = False) -> Any:
    """The hub of this version of an application, whether replicas run or not. Blocks on the cluster's store.

    any_version: another version's will do, where this one's replicas and so its hub have gone. Raises ValueError when
    there is none.
    """
    name = get_deployment_actor_name(DeploymentID(REPLICA_DEPLOYMENT, app_name), HUB_NAME, code_version)
    try:
        return ray.get_actor(name, SERVE_NAMESPACE)
    except ValueError:
        others = _predecessors(name) if any_version else []
        if not others:
            raise
        return ray.get_actor(others[0], SERVE_NAMESPACE)


def _application(own: str) -> str:
    """What all versions of this hub have in common."""
    return "::".join(own.split("::")[:-2])


def _predecessors(own: str) -> list[str]:
    """Hubs of other versions of the same application. Serve's name is ``…application::deployment::version::name``."""
    parts = own.split("::")
    if len(parts) < 4:
        return []
    listed: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in listed if entry["namespace"] == SERVE_NAMESPACE]
    same = [name for name in names if (*name.split("::")[:-2], name.split("::")[-1]) == (*parts[:-2], parts[-1])]
    return [name for name in same if name != own]

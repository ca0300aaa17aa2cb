"""One GPU (or CPU) replica: an engine behind Serve, and the news of which adapters it holds."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from ray import serve

from adapter_store.slots import Residency
from deployments import wire
from deployments.pacing import StreamPacing, paced, together
from deployments.residency import ReplicaNews, short_key
from deployments.residency_feed import HUB_NAME, ResidencyPublisher
from deployments.settings import FleetSettings
from engine.engine import Engine
from engine.request import EngineDead, EngineOverloaded, GenerationRequest

logger = logging.getLogger("ray.serve")


class LoraReplica:
    """Serve deployment: one engine. Called by the gateway only, through ``AdapterRouter``."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        parsed = FleetSettings.model_validate(settings)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._pacing = StreamPacing(parsed.replicas.stream_items_per_s, parsed.replicas.stream_max_delay_s)
        engine_settings = parsed.engine_settings()
        self._capacity = engine_settings.max_rows + engine_settings.max_waiting
        self._streams = 0
        self._draining = False
        self._saturated = False
        self._loop = asyncio.get_running_loop()
        hub: Any = serve.get_deployment_actor(HUB_NAME)
        self._hub_name = await hub.name.remote()
        self._engine = Engine(engine_settings, self._on_residency)
        await self._engine.start()
        self._publisher = ResidencyPublisher(self._news, lambda: serve.get_deployment_actor(HUB_NAME))
        logger.info("ready: %s can be asked now", parsed.base_model_name)

    async def stream(
        self, request: dict[str, Any], whole: bool = False, avoid: tuple[str, ...] = ()
    ) -> AsyncGenerator[dict[str, Any]]:
        """The engine's chunks for one ``GenerationRequest``, as plain dicts; a refusal is the last item.

        whole: one item with all of it. ``avoid`` is for the router, which reads it before the request gets here.
        """
        self._streams += 1
        try:
            chunks = self._engine.generate(GenerationRequest.from_dict(request))
            items = together(chunks) if whole else paced(chunks, self._delay_s)
            async with aclosing(chunks), aclosing(items):
                async for chunk in items:
                    yield wire.encode_chunk(chunk)
        except wire.REFUSALS as error:
            self._watch_queue(full=isinstance(error, EngineOverloaded))
            if isinstance(error, EngineDead) and not self._draining:
                self._draining = True  # until Serve has replaced this replica
                self._publish()
            yield wire.encode_error(error, self._name)
        finally:
            self._streams -= 1
            self._watch_queue(full=False)

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, and this replica's name, process and open streams."""
        return {"replica": self._name, "streams": self._streams, "pid": os.getpid(), **asdict(self._engine.stats())}

    async def check_health(self) -> None:
        """Called by Serve. Raises EngineDead when the step loop has stopped, and the replica is replaced."""
        if not self._engine.healthy:
            raise EngineDead("the engine's step loop has stopped")

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """``user_config`` changes the pacing of streams without a restart: ``stream_items_per_s`` and
        ``stream_max_delay_s``. Raises ValueError for anything else."""
        self._pacing = self._pacing.changed(user_config or {})

    def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve once; routers learn here where to listen for residency news."""
        return {"residency_hub": self._hub_name}

    async def __del__(self) -> None:
        """Called by Serve when the replica has drained."""
        self._draining = True
        await self._publisher.close()
        await self._engine.close()

    def _delay_s(self) -> float:
        return self._pacing.delay_s(self._streams)

    def _on_residency(self, _: Residency) -> None:
        """Called by the engine on its own thread."""
        self._loop.call_soon_threadsafe(self._publish)

    def _publish(self) -> None:
        self._publisher.changed()

    def _watch_queue(self, *, full: bool) -> None:
        """Tell routers when the queue fills up, and when there is room again."""
        if full != self._saturated and (full or self._streams < self._capacity):
            self._saturated = full
            self._publish()

    def _news(self, version: int) -> ReplicaNews:
        stats = self._engine.stats()
        return ReplicaNews(
            self._name,
            version,
            frozenset(map(short_key, stats.resident)),
            frozenset(map(short_key, stats.host_cached)),
            stats.running,
            stats.waiting,
            self._saturated,
            self._draining,
        )

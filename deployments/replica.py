"""One GPU (or CPU) replica: an engine behind Serve, and the news of which adapters it holds."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import asdict
from typing import Any

from ray import serve

from adapter_store.slots import Residency
from deployments import wire
from deployments.adapters.declaration_feed import DeclarationFeed
from deployments.adapters.declarations import Declaration
from deployments.adapters.pins import PinKeeper
from deployments.adapters.replica_adapters import ReplicaAdapters
from deployments.console.replica_view import ReplicaView
from deployments.draining import Drain
from deployments.hub import HUB_METADATA, HUB_NAME
from deployments.live import LiveConfig
from deployments.news.holdings import Holdings
from deployments.news.publisher import NewsPublisher
from deployments.observability import replica_metrics
from deployments.observability.catalog import REPLICA
from deployments.observability.publisher import MetricPublisher, Reading
from deployments.observability.spans import generation_span
from deployments.observability.tracing import Tracing
from deployments.pacing import StreamPacing, paced, together
from deployments.placement import Reason
from deployments.routing.arrivals import Arrivals
from deployments.routing.fleet_view import ReplicaLoad
from deployments.routing.short_key import short_key
from deployments.scaling.heat import HotAdapter
from deployments.scaling.pressure import PressureGauge
from deployments.scaling.warm_up import HeatTeller, choose, warm_up
from deployments.settings import FleetSettings
from engine.engine import Engine
from engine.request import EngineDead, EngineOverloaded, GenerationRequest

WARM_UP_CHOICE = 32  # adapters to choose from for each slot: a replica is home to one in as many as there are replicas

logger = logging.getLogger("ray.serve")


class LoraReplica:
    """Serve deployment: one engine. Called by the gateway only, through ``AdapterRouter``."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        self._open = AsyncExitStack()  # what is there to close, also of a replica that could not be made
        self._draining = False
        parsed = FleetSettings.model_validate(settings)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._config = LiveConfig(parsed)
        self._pacing = _pacing(parsed)
        engine_settings = parsed.engine_settings()
        self._max_rows = engine_settings.max_rows
        self._capacity = engine_settings.max_rows + engine_settings.max_waiting
        self._streams = 0
        self._request_ids: set[str] = set()
        self._saturated = False
        self._loop = asyncio.get_running_loop()
        hub: Any = serve.get_deployment_actor(HUB_NAME)
        self._hub_name = await hub.name.remote()
        self._holdings = Holdings()
        self._arrivals = Arrivals()
        self._engine = Engine(engine_settings, self._on_residency)
        self._open.push_async_callback(self._engine.close)
        await self._engine.start()
        self._adapters = ReplicaAdapters(self._engine)
        version = serve.get_replica_context().code_version or ""
        self._view = ReplicaView(self._name, version[:8], self._engine, lambda: self._draining)
        self._pressure = PressureGauge(self._engine)
        self._feed = DeclarationFeed(_own_hub, self._hear)
        self._pins: PinKeeper | None = None
        store = self._engine.parts.store
        if store is not None:
            refresh_s = engine_settings.store.hub_refresh_s
            self._pins = PinKeeper(self._engine, store.catalog, self._feed.known.pinned, refresh_s)
            self._open.push_async_callback(self._pins.close)
        self._feed.start()
        self._open.push_async_callback(self._feed.close)
        self._tracing = Tracing(parsed.tracing.endpoint, parsed.tracing.sample, self._name)
        self._open.push_async_callback(asyncio.to_thread, self._tracing.close)
        self._metrics = MetricPublisher(REPLICA, self._read_metrics, replica_metrics.PERIOD_SECONDS)
        self._metrics.start()
        self._open.push_async_callback(self._metrics.close)
        self._publisher = NewsPublisher(self._name, self._holdings, self._load, _own_hub)
        self._open.push_async_callback(self._publisher.close)
        self._heat = HeatTeller(self._name, _own_hub, 2 * sum(dict(engine_settings.slots).values()), self._ranks)
        self._open.push_async_callback(self._heat.close)
        if store is not None:
            store.host_cache.on_change = self._on_host_cache
            await warm_up(self._engine, self._wanted, parsed.replicas.warm_up_s)
        self._drain = Drain(parsed.replicas.graceful_shutdown_timeout_s, self._abort_all, self._begin_to_drain)
        self._drain.start()
        self._open.push_async_callback(self._drain.close)
        logger.info("ready: %s can be asked now", parsed.base_model_name)

    async def stream(
        self, request: dict[str, Any], whole: bool = False, routing: dict[str, Any] | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """The engine's chunks for one ``GenerationRequest``, as plain dicts; a refusal is the last item.

        whole: one item with all of it. routing: what the router read before the request came here, and its reason;
        ``trace``: the span that this one is part of, see ``tracing.carried``.
        """
        routing = routing or {}
        self._streams += 1
        if self._streams == 1:
            self._publisher.changed()
        try:
            asked = GenerationRequest.from_dict(request)
            self._heat.asked(asked.adapter, asked.adapter_digest)
            with (
                self._adapters.used_by_request(asked.adapter, asked.adapter_digest, asked.api_token),
                self._told(asked.adapter_digest, routing),
                generation_span(self._tracing.tracer, routing.get("trace", {}), asked, self._name) as progress,
            ):
                self._request_ids.add(asked.request_id)
                chunks = self._engine.generate(asked)
                items = together(chunks) if whole else paced(chunks, self._delay_s)
                async with aclosing(chunks), aclosing(items):
                    async for chunk in items:
                        progress.last = chunk
                        yield wire.encode_chunk(chunk)
        except wire.REFUSALS as error:
            self._watch_queue(full=isinstance(error, EngineOverloaded))
            if isinstance(error, EngineDead) and not self._draining:
                self._begin_to_drain()  # until Serve has replaced this replica
            yield wire.encode_error(error, self._name)
        finally:
            self._streams -= 1
            self._request_ids.discard(request["request_id"])
            self._watch_queue(full=False)

    async def stats(self) -> dict[str, Any]:
        """The engine's statistics, and this replica's name, process and open streams."""
        return {"replica": self._name, "streams": self._streams, "pid": os.getpid(), **asdict(self._engine.stats())}

    async def check_health(self) -> None:
        """Called by Serve. Raises EngineDead when the step loop has stopped, and the replica is replaced."""
        if not self._engine.healthy:
            raise EngineDead("the engine's step loop has stopped")

    async def order(self, method: str, *args: Any) -> dict[str, Any]:
        """An operator's order, from a gateway: ``{"replica", "result"}``, or what ``wire.encode_error`` makes of a
        refusal."""
        orders: dict[str, Callable[..., Awaitable[Any]]] = {
            "prefetch": self._adapters.prefetch,
            "unload": self._adapters.unload,
            "settle_pins": self._settle_pins,
            "held": self._held,
            "view": self._view.read,
        }
        try:
            return {"replica": self._name, "result": await orders[method](*args)}
        except wire.REFUSALS as error:
            return wire.encode_error(error, self._name)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Put a ``user_config`` into force, see ``LiveSettings``. One with a mistake changes nothing."""
        await asyncio.to_thread(self._config.take, user_config, self._apply)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve every few seconds where it scales this deployment; ``autoscaling`` reads it."""
        return self._pressure.read()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Called by Serve once; routers learn here where to listen for news."""
        return {HUB_METADATA: self._hub_name}

    async def __del__(self) -> None:
        """Called by Serve when the replica has drained, or could not be made."""
        self._draining = True
        await self._open.aclose()

    async def _read_metrics(self) -> Reading:
        refused = self._config.refused is not None
        return await asyncio.to_thread(replica_metrics.read, self._engine, refused=refused)

    def _apply(self, settings: FleetSettings) -> None:
        store = self._engine.parts.store
        if store is not None:
            store.catalog.reconfigure(settings.store_settings())
        self._pacing = _pacing(settings)

    async def _hear(self, news: list[Declaration]) -> None:
        store = self._engine.parts.store
        if store is None or self._pins is None:
            return
        store.catalog.declare(self._feed.known.references())
        self._pins.changed()

    async def _settle_pins(self) -> dict[str, str]:
        failed = {} if self._pins is None else await self._pins.settle()
        return {name: error.reason for name, error in failed.items()}

    async def _held(self) -> dict[str, Any]:
        return self._adapters.held()

    def _ranks(self) -> dict[str, int]:
        slots = self._engine.parts.slots
        return {} if slots is None else dict(slots.residency().adapters)

    async def _wanted(self) -> list[HotAdapter]:
        """What this replica should have before it takes requests."""
        slots = dict(self._engine.settings.slots)
        hub = await _own_hub()
        hottest, replicas = await hub.hottest.remote(WARM_UP_CHOICE * sum(slots.values()))
        return choose(hottest, self._name, replicas, slots)

    def _begin_to_drain(self) -> None:
        self._draining = True
        self._publisher.changed()

    def _abort_all(self) -> None:
        """Their gateways try again elsewhere what had not begun, and tell the clients of the others."""
        for request_id in self._request_ids:
            self._engine.abort(request_id)

    def _delay_s(self) -> float:
        return self._pacing.delay_s(self._streams)

    def _on_residency(self, residency: Residency) -> None:
        """Called by the engine on its own thread."""
        self._loop.call_soon_threadsafe(self._hold_slots, residency)

    def _hold_slots(self, residency: Residency) -> None:
        self._holdings.in_slots(map(short_key, residency.adapters))
        self._publisher.changed()

    def _on_host_cache(self, digest: str, held: bool) -> None:
        """Called by the store on any thread."""
        self._loop.call_soon_threadsafe(self._hold_in_host, digest, held)

    def _hold_in_host(self, digest: str, held: bool) -> None:
        self._holdings.in_host(short_key(digest), held=held)
        self._publisher.changed()

    @contextmanager
    def _told(self, digest: str | None, routing: dict[str, Any]) -> Iterator[None]:
        """Around one request: while it is here its adapter is in a slot or on its way to one."""
        if digest is None:
            yield
            return
        key, reason = short_key(digest), routing.get("reason", "")
        self._arrivals.count(reason, self._holdings.where(key))
        if self._holdings.asked(key) and reason != Reason.HOME:  # every router would look for it at its home
            self._publisher.changed()
        try:
            yield
        finally:
            if self._holdings.left(key):
                self._publisher.changed()

    def _watch_queue(self, *, full: bool) -> None:
        """Tell routers when the queue fills up, and when there is room again."""
        if full != self._saturated and (full or self._streams < self._capacity):
            self._saturated = full
            self._publisher.changed()

    def _load(self) -> ReplicaLoad:
        load = self._engine.load()
        return ReplicaLoad(
            load.running,
            load.waiting,
            self._max_rows,
            load.ranks,
            load.free_slots,
            self._saturated,
            self._draining,
            self._holdings.rows,
        )


def _pacing(settings: FleetSettings) -> StreamPacing:
    return StreamPacing(settings.replicas.stream_items_per_s, settings.replicas.stream_max_delay_s)


async def _own_hub() -> Any:
    """The hub that Serve keeps beside this deployment. Finding it blocks on the cluster's store."""
    return await asyncio.get_running_loop().run_in_executor(None, serve.get_deployment_actor, HUB_NAME)

"""The application under each router: the same engines and gateways, and one instrument that counts in all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import StrEnum
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from deployments.app import application
from deployments.gateway import Gateway
from deployments.replica import LoraReplica
from deployments.settings import FleetSettings


class Policy(StrEnum):
    """Whose router stands before the replicas."""

    OURS = "ours"
    # Serve's power of two choices among the replicas that its multiplexing table names, and the cache that makes that
    # table, which is one of least recent use.
    DEFAULT = "default"
    HASH = "hash"  # Serve's ConsistentHashRouter; an adapter is a session


class WatchedReplica(LoraReplica):
    """Counts the requests that come, and those whose adapter is in a slot at that moment."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        self._asked = self._found = 0
        await super().__init__(settings)

    async def stream(self, request: dict[str, Any], *args: Any, **options: Any) -> AsyncGenerator[dict[str, Any]]:
        """See ``LoraReplica``."""
        slots = self._engine.parts.slots
        assert slots is not None
        self._asked += 1
        self._found += request["adapter_digest"] in slots.residency().adapters
        async with aclosing(super().stream(request, *args, **options)) as items:
            async for item in items:
                yield item

    async def stats(self) -> dict[str, Any]:
        """See ``LoraReplica``; and ``asked``, ``found``; ``loads``: copies from host memory to slots; ``fetched``: of
        those, what was not in host memory."""
        slots = self._engine.parts.slots
        assert slots is not None
        store = self._engine.parts.store
        assert store is not None
        own = {"asked": self._asked, "found": self._found, "loads": slots.stats().copies.done}
        own["fetched"] = store.host_cache.stats().misses
        return await super().stats() | own


def mirrored(slots: int) -> type[WatchedReplica]:
    """A replica that tells Serve's multiplexing table what it holds, through a cache of ``slots`` names."""

    class MirroredReplica(WatchedReplica):
        async def stream(self, request: dict[str, Any], *args: Any, **options: Any) -> AsyncGenerator[dict[str, Any]]:
            mirror: Any = self._mirror  # the decorator's type says nothing of methods
            await mirror(request["adapter_digest"])
            async with aclosing(super().stream(request, *args, **options)) as items:
                async for item in items:
                    yield item

        @serve.multiplexed(max_num_models_per_replica=slots)
        async def _mirror(self, adapter: str) -> str:
            return adapter

    return MirroredReplica


class _BySession:
    """A handle on which an adapter is a session, which is what the hash router goes by."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def options(self, **options: Any) -> _BySession:
        adapter = options.pop("multiplexed_model_id", None)
        return _BySession(self._handle.options(**options, **({"session_id": adapter} if adapter else {})))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class SessionGateway(Gateway):
    """A gateway whose requests are sessions."""

    def __init__(self, replicas: Any, settings: dict[str, Any]) -> None:
        super().__init__(_BySession(replicas), settings)  # pyright: ignore[reportArgumentType]


def build(policy: Policy, settings: FleetSettings, slots: int) -> Application:
    """The application with this router. Gateways are on different nodes, replicas on all of them."""
    gateway: Deployment = application(settings)._bound_deployment
    replicas: Deployment = gateway.init_args[0]._bound_deployment
    consistent: Any = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    kinds: dict[Policy, tuple[type, type, RequestRouterConfig | None]] = {
        Policy.OURS: (WatchedReplica, Gateway, None),
        Policy.DEFAULT: (mirrored(slots), Gateway, RequestRouterConfig()),
        Policy.HASH: (
            WatchedReplica,
            SessionGateway,
            RequestRouterConfig(request_router_class=consistent),
        ),
    }
    replica_class, gateway_class, router = kinds[policy]
    changed: dict[str, Any] = {} if router is None else {"request_router_config": router}
    bound = replicas.options(func_or_class=replica_class, max_replicas_per_node=2, **changed).bind(*replicas.init_args)
    fronts = gateway.options(func_or_class=serve.ingress()(gateway_class), max_replicas_per_node=1)
    return fronts.bind(bound, *gateway.init_args[1:])

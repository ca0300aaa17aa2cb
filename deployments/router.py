"""Adapter-affinity routing inside Ray Serve: the policy of ``placement`` behind Serve's ``RequestRouter``.

Everything that leans on Serve's alpha or private router API is in this file. Serve 2.60 ships this module to
routers by value: it keeps no state at module level, and it reaches objects that must not be copied through their
module (``routing_counters.counters``), which travels by name.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from typing import Any

from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve._private.replica_result import ReplicaResult
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments import routing_counters
from deployments.placement import Reason
from deployments.placement_policy import PlacementPolicy
from deployments.replica_ranking import ReplicaState, rank_replicas, rendezvous_order
from deployments.residency import ResidencyView
from deployments.residency_feed import watch_hub

SINGLE_RANKS = 8  # after this many replicas tried one by one, the rest is one rank for Serve to pick from
HOMES_CACHED = 4096
HUB_METADATA = "residency_hub"  # LoraReplica publishes its hub's actor name under this key


class AdapterRouter(RequestRouter):
    """Sends a request to a replica that has its adapter (``multiplexed_model_id``, the content digest).

    How it stays clear of what goes wrong in Serve's router API:

    - pending requests are keyed by themselves, not by ``internal_request_id``, which calls made from one
      ingress request share: with that key all but one of them would wait for ever;
    - replicas are offered one by one, so the preferred one is asked before the next is considered, also when
      the local queue-length cache takes it for full (that cache only knows this router's own traffic);
    - ``should_backoff`` is set, so full replicas are not polled in a tight loop;
    - every replica is in the ranking, so a request for an idle replica never waits behind a full one;
    - the queue-length cache moves when a replica is chosen, not when the request is sent, so requests routed
      in one tick see each other.
    """

    def initialize_state(self, prediction_ttl_s: float = 1.0, **policy: Any) -> None:
        """Called by Serve with ``request_router_kwargs``: the fields of ``PlacementPolicy`` and of the view."""
        self._policy = PlacementPolicy(**policy)
        self._view = ResidencyView(prediction_ttl_s)
        self._in_flight: Counter[str] = Counter()
        self._homes: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._keys: tuple[str, ...] = ()
        self._reasons: dict[int, dict[ReplicaID, Reason]] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._turn = 0

    # -- what Serve tells us -------------------------------------------------------------------------------

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of which replicas run."""
        super().update_replicas(replicas)
        self._view.keep_only(replica.replica_id.unique_id for replica in replicas)
        hubs = {replica.replica_metadata.get(HUB_METADATA, "") for replica in replicas} - {""}
        for name in self._watchers.keys() - hubs:
            self._watchers.pop(name).cancel()
        for name in hubs - self._watchers.keys():
            self._watchers[name] = self._event_loop.create_task(watch_hub(name, self._view))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found the replica dead before the controller did."""
        super().on_replica_actor_died(replica_id)
        self._view.forget(replica_id.unique_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """The replica accepted the request: it is in flight until its result is complete."""
        adapter = pending_request.metadata.multiplexed_model_id
        if not adapter:
            return
        self._in_flight[adapter] += 1
        # Called from a foreign thread, and at once when the result is complete already.
        result.add_done_callback(lambda _: self._event_loop.call_soon_threadsafe(self._finished, adapter))

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Nothing to do: the request was counted when the replica was chosen."""

    # -- choosing ------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates by preference: the first ``SINGLE_RANKS`` one by one, the rest as one rank."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        adapter = pending_request.metadata.multiplexed_model_id
        avoid = frozenset(pending_request.kwargs.get("avoid", ()))
        now = self._get_curr_time_s()
        states = [self._state(replica, adapter, avoid, now) for replica in candidate_replicas]
        homes = self._home_order(adapter, tuple(state.key for state in states)) if adapter else ()
        self._turn += 1
        ranking = rank_replicas(states, homes, self._policy, self._in_flight[adapter], self._turn)
        ordered = [candidate_replicas[choice.index] for choice in ranking]
        self._reasons[id(pending_request.metadata)] = {
            replica.replica_id: choice.reason for replica, choice in zip(ordered, ranking, strict=True)
        }
        ranks = [[replica] for replica in ordered[:SINGLE_RANKS]]
        return [*ranks, ordered[SINGLE_RANKS:]] if len(ordered) > SINGLE_RANKS else ranks

    def _state(self, replica: RunningReplica, adapter: str, avoid: frozenset[str], now: float) -> ReplicaState:
        key = replica.replica_id.unique_id
        news = self._view.news.get(key)
        return ReplicaState(
            key,
            load=self._replica_queue_len_cache.get(replica.replica_id) or 0,
            resident=bool(adapter) and self._view.is_resident(key, adapter, now),
            host_cached=bool(adapter) and self._view.is_host_cached(key, adapter),
            saturated=key in avoid or (news is not None and news.saturated),
            draining=news is not None and news.draining,
        )

    def _home_order(self, adapter: str, keys: tuple[str, ...]) -> tuple[int, ...]:
        if keys != self._keys:
            self._keys = keys
            self._homes.clear()
        homes = self._homes.get(adapter)
        if homes is None:
            homes = self._homes[adapter] = rendezvous_order(adapter, keys)
            if len(self._homes) > HOMES_CACHED:
                self._homes.popitem(last=False)
        return homes

    def _finished(self, adapter: str) -> None:
        self._in_flight[adapter] -= 1
        if self._in_flight[adapter] <= 0:
            del self._in_flight[adapter]

    # -- private hooks of Serve 2.60 -----------------------------------------------------------------------

    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id[_key(pending_request.metadata)] = pending_request

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        self._pending_requests_by_id.pop(_key(pending_request.metadata), None)
        self._reasons.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        pending = None if request_metadata is None else self._pending_requests_by_id.get(_key(request_metadata))
        return None if pending is None or pending.future.done() else pending

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        pending = self._get_pending_request_matching_internal_request_id(request_metadata)
        if pending is None:
            return
        reason = self._reasons.get(id(pending.metadata), {}).get(replica.replica_id, Reason.LEAST_LOADED)
        super()._fulfill_next_pending_request(replica, request_metadata)
        super().on_send_request(replica.replica_id)
        routing_counters.counters.count(reason)
        adapter = pending.metadata.multiplexed_model_id
        if adapter:
            self._view.predict(replica.replica_id.unique_id, adapter, self._get_curr_time_s())


def _key(metadata: RequestMetadata) -> str:
    """Identity of one pending request: its metadata object lives as long as the request is pending."""
    return str(id(metadata))

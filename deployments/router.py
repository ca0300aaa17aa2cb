"""Adapter-affinity routing inside Ray Serve: the policy of ``placement`` behind Serve's ``RequestRouter``.

Everything that leans on Serve's alpha or private router API is in this file. Serve 2.60 ships this module to
routers by value: it keeps no state at module level, and it reaches objects that must not be copied through their
module (``routing_counters.counters``), which travels by name.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from functools import partial
from typing import Any

import ray
from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.hub import HUB_METADATA, SERVE_NAMESPACE
from deployments.news.reader import NewsReader, listen
from deployments.placement import PlacementRequest, Reason, place
from deployments.routing import routing_counters
from deployments.routing.fleet_view import FleetView
from deployments.routing.placement_policy import PlacementPolicy
from deployments.routing.short_key import short_key

ROUTING = "routing"  # keyword argument of a call that says what a decision needs to know, see ``Fleet``


class AdapterRouter(RequestRouter):
    """Sends a request to a replica that has its adapter (``multiplexed_model_id``, the content digest).

    How it stays clear of what goes wrong in Serve's router API:

    - pending requests are keyed by themselves, not by ``internal_request_id``, which calls made from one
      ingress request share: with that key all but one of them would wait for ever;
    - replicas are offered one by one, so the preferred one is asked before the next is considered, also when
      the local queue-length cache takes it for full (that cache only knows this router's own traffic);
    - ``should_backoff`` is set, so full replicas are not polled in a tight loop;
    - every replica is in the ranking, so a request for an idle replica never waits behind a full one;
    - a request counts from the moment that its replica is chosen, not from when it is sent, so requests routed
      in one tick see each other.
    """

    def initialize_state(self, **policy: Any) -> None:
        """Called by Serve with ``request_router_kwargs``: the fields of ``PlacementPolicy``."""
        self._view = FleetView(PlacementPolicy(**policy))
        self._by_name: dict[str, RunningReplica] = {}
        self._readers: dict[str, tuple[NewsReader, asyncio.Task[None]]] = {}  # by hub
        self._reasons: dict[int, dict[str, Reason]] = {}  # of pending requests: replica -> why it was ranked
        self._sent: dict[tuple[ReplicaID, str], Counter[str]] = {}  # adapters of requests that are not complete

    # -- what Serve tells us -------------------------------------------------------------------------------

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's news of which replicas run."""
        super().update_replicas(replicas)
        self._by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        hubs = {replica.replica_metadata.get(HUB_METADATA, "") for replica in replicas} - {""}
        for name in self._readers.keys() - hubs:
            self._readers.pop(name)[1].cancel()
        for name in hubs - self._readers.keys():
            reader = NewsReader(self._view, heard=routing_counters.counters.heard)
            self._readers[name] = reader, self._event_loop.create_task(listen(partial(_find_hub, name), reader))
        self._view.keep_only(tuple(self._by_name))
        for reader, _ in self._readers.values():
            reader.keep_only(self._by_name)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A call found the replica dead before the controller did."""
        super().on_replica_actor_died(replica_id)
        name = replica_id.unique_id
        self._by_name.pop(name, None)
        self._view.keep_only(tuple(self._by_name))
        for reader, _ in self._readers.values():
            reader.keep_only(self._by_name)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request that a replica was chosen for is complete, was refused there or was given up.

        Calls of one ingress request share the id; they are for the same adapter, so that any of them will do.
        """
        sent = self._sent.get((replica_id, internal_request_id))
        if sent is None:
            return  # a broadcast: nothing was chosen
        adapter = next(iter(sent))
        sent[adapter] -= 1
        if not sent[adapter]:
            del sent[adapter]
        if not sent:
            del self._sent[replica_id, internal_request_id]
        self._view.finished(replica_id.unique_id, adapter)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Nothing to do: the request was counted when the replica was chosen."""

    # -- choosing ------------------------------------------------------------------------------------------

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas of ``place`` one by one, then all others as one rank for Serve to pick from."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        ranking = place(self._view, _request(pending_request), self._get_curr_time_s())
        self._reasons[id(pending_request.metadata)] = {choice.replica: choice.reason for choice in ranking}
        singles = [self._by_name[choice.replica] for choice in ranking]
        named = {choice.replica for choice in ranking}
        rest = [replica for name, replica in self._by_name.items() if name not in named]
        ranks = [[replica] for replica in singles]
        return [*ranks, rest] if rest else ranks

    # -- private hooks of Serve 2.60 -----------------------------------------------------------------------

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except asyncio.CancelledError:
            future = pending_request.future
            if future.done() and not future.cancelled():  # chosen, but nobody waits for it any more
                replica_id = future.result().replica_id
                self.on_request_completed(replica_id, pending_request.metadata.internal_request_id)
            raise

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
        name, metadata = replica.replica_id.unique_id, pending.metadata
        reason = self._reasons.get(id(metadata), {}).get(name, Reason.LEAST_LOADED)
        super()._fulfill_next_pending_request(replica, request_metadata)
        super().on_send_request(replica.replica_id)
        routing_counters.counters.count(reason)
        if ROUTING in pending.kwargs:
            pending.kwargs[ROUTING] |= {"reason": reason.value, "replica": name, "chosen_ns": time.time_ns()}
        adapter = short_key(metadata.multiplexed_model_id)
        self._sent.setdefault((replica.replica_id, metadata.internal_request_id), Counter())[adapter] += 1
        self._view.routed(name, adapter, self._get_curr_time_s())


def _request(pending: PendingRequest) -> PlacementRequest:
    routing = pending.kwargs.get(ROUTING, {})
    return PlacementRequest(
        short_key(pending.metadata.multiplexed_model_id),
        avoid=frozenset(routing.get("avoid", ())),
    )


async def _find_hub(name: str) -> Any:
    """Finding an actor by name blocks on the cluster's store, so it is done beside the router's loop."""
    return await asyncio.get_running_loop().run_in_executor(None, ray.get_actor, name, SERVE_NAMESPACE)


def _key(metadata: RequestMetadata) -> str:
    """Identity of one pending request: its metadata object lives as long as the request is pending."""
    return str(id(metadata))

"""A replica as Serve's router sees one, without a cluster."""

from __future__ import annotations

import asyncio

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RunningReplica

DEPLOYMENT = DeploymentID("LoraReplica", "lorafleet")


class FakeReplica(RunningReplica):
    """Answers queue-length probes with ``queue_len`` and counts them."""

    def __init__(self, name: str, queue_len: int = 0, max_ongoing: int = 10) -> None:
        self._id = ReplicaID(name, DEPLOYMENT)
        self.queue_len = queue_len
        self._max_ongoing = max_ongoing
        self.probes = 0

    replica_id = property(lambda self: self._id)
    node_id = property(lambda self: "node")
    availability_zone = property(lambda self: None)
    multiplexed_model_ids = property(lambda self: set())
    replica_metadata = property(lambda self: {})
    max_ongoing_requests = property(lambda self: self._max_ongoing)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probes += 1
        await asyncio.sleep(0)
        return self.queue_len


class FakeResult:
    """The part of a ReplicaResult that the router uses."""

    def __init__(self) -> None:
        self.callbacks = []

    def add_done_callback(self, callback) -> None:
        self.callbacks.append(callback)

    def finish(self) -> None:
        for callback in self.callbacks:
            callback(None)


def pending(adapter: str = "", internal_request_id: str = "shared", **kwargs) -> PendingRequest:
    metadata = RequestMetadata(
        request_id="request", internal_request_id=internal_request_id, multiplexed_model_id=adapter, is_streaming=True
    )
    return PendingRequest(args=[], kwargs=kwargs, metadata=metadata)


def make_router(router_class, replicas, **state):
    router = router_class(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=0.01,
        max_backoff_s=0.05,
    )
    router.initialize_state(**state)
    router.update_replicas(replicas)
    return router

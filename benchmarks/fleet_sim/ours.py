"""LoRAFleet's placement in the simulation: the code that the Serve router runs, one view for each router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fleet_sim.replica import SimReplica
from deployments.placement import PlacementRequest, place
from deployments.routing.fleet_view import FleetView, ReplicaLoad, Tier
from deployments.routing.placement_policy import PlacementPolicy

RANK = 16


@dataclass(frozen=True, slots=True)
class _News:
    load: ReplicaLoad | None  # as ``NewsPublisher`` tells it: with news of adapters, or when it decides something
    slots: tuple[list[str], list[str]]  # what came and what went
    host: tuple[list[str], list[str]]


class Placement:
    """``place`` over a ``FleetView`` for each router."""

    def __init__(self, routers: int, report_s: float, delay_s: float, policy: PlacementPolicy | None = None) -> None:
        self.report_s: float | None = report_s
        self.delay_s = delay_s
        self._told: dict[str, ReplicaLoad] = {}
        self._views = [FleetView(policy or PlacementPolicy()) for _ in range(routers)]

    def replicas_are(self, replicas: Sequence[SimReplica]) -> None:
        for view in self._views:
            view.keep_only([replica.name for replica in replicas])

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        request = PlacementRequest(adapter, avoid)
        return [choice.replica for choice in place(self._views[router], request, now)]

    def sent(self, router: int, replica: SimReplica, adapter: str, now: float) -> None:
        self._views[router].routed(replica.name, adapter, now)

    def finished(self, router: int, replica: SimReplica, adapter: str) -> None:
        self._views[router].finished(replica.name, adapter)

    def news(self, replica: SimReplica) -> _News:
        load = ReplicaLoad(
            running=replica.running,
            waiting=replica.count - replica.running,
            max_rows=replica.shape.max_rows,
            ranks=RANK * replica.running,
            free_slots=((RANK, replica.unreferenced()),),
            saturated=replica.full,
            rows=dict(replica.rows),
        )
        slots, host = replica.take_changes()
        told = self._told.get(replica.name)
        if not any((*slots, *host)) and told is not None and told.stage == load.stage:
            return _News(None, slots, host)
        self._told[replica.name] = load
        return _News(load, slots, host)

    def heard(self, replica: SimReplica, news: object, now: float) -> None:
        assert isinstance(news, _News)
        for view in self._views:
            view.change(replica.name, Tier.RESIDENT, *news.slots)
            view.change(replica.name, Tier.HOST, *news.host)
            if news.load is not None:
                view.report(replica.name, news.load)

"""What a simulation asks of a routing policy, and what Serve's own routers keep of their traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.fleet_sim.replica import SimReplica

QUEUE_CACHE_S = 10.0  # Ray Serve's default


class RoutingPolicy(Protocol):
    """Several routers of one policy; each knows its own traffic and the news that reach all of them.

    report_s: how often a replica with changes tells of them at most; None when nobody listens. delay_s: how long its
    news are on their way.
    """

    report_s: float | None
    delay_s: float

    def replicas_are(self, replicas: Sequence[SimReplica]) -> None:
        """These run, until the next call."""
        ...

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        """Names of the replicas to try, one after the other."""
        ...

    def sent(self, router: int, replica: SimReplica, adapter: str, now: float) -> None:
        """The replica took the request."""
        ...

    def finished(self, router: int, replica: SimReplica, adapter: str) -> None:
        """The request is complete."""
        ...

    def news(self, replica: SimReplica) -> object:
        """What the replica tells now; the changes in it are taken."""
        ...

    def heard(self, replica: SimReplica, news: object, now: float) -> None:
        """Its news reached the routers."""
        ...


class QueueLengths:
    """Serve's queue-length cache of one router: what a replica said when it took a request, and own traffic since.

    An entry that is older than ten seconds is asked for anew, here without delay.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, float]] = {}

    def get(self, replica: SimReplica, now: float) -> int:
        length, at = self._known.get(replica.name, (0, -QUEUE_CACHE_S))
        if now - at < QUEUE_CACHE_S:
            return length
        self._known[replica.name] = (replica.count, now)
        return replica.count

    def sent(self, replica: SimReplica, now: float) -> None:
        self._known[replica.name] = (replica.count, now)

    def finished(self, replica: SimReplica) -> None:
        known = self._known.get(replica.name)
        if known is not None:
            self._known[replica.name] = (max(0, known[0] - 1), known[1])

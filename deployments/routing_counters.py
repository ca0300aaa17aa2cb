"""Counts of routing decisions by reason, for this process and for Prometheus.

They live apart from the router because Serve ships the router's module by value: a global there would be a
copy that nothing else can read. This module is imported, so the router and the gateway share it.
"""

from __future__ import annotations

from collections import Counter as Tally

from ray.util import metrics

from deployments.placement import Reason


class RoutingCounters:
    """Decisions taken by the routers of one process. Only ever touched from those routers' loop."""

    def __init__(self) -> None:
        self._tally: Tally[str] = Tally({reason.value: 0 for reason in Reason})
        self._metric = metrics.Counter(
            "lorafleet_routing_decisions",
            description="Requests given to a replica, by the reason for choosing it.",
            tag_keys=("reason",),
        )

    def count(self, reason: Reason) -> None:
        """One request was given to a replica for this reason."""
        self._tally[reason.value] += 1
        self._metric.inc(tags={"reason": reason.value})

    def as_dict(self) -> dict[str, int]:
        """Totals by reason since the process started."""
        return dict(self._tally)


counters = RoutingCounters()

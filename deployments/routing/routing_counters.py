"""Counts of routing decisions by reason and the age of what they rest on, for this process and for Prometheus.

They live apart from the router because Serve ships the router's module by value: a global there would be a
copy that nothing else can read. This module is imported, so the router and the gateway share it.
"""

from __future__ import annotations

from collections import Counter as Tally

from ray.util import metrics

from deployments.observability.catalog import NEWS_AGE, NEWS_DELAY, ROUTING_DECISIONS
from deployments.placement import Reason

DELAY_BOUNDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0]


class RoutingCounters:
    """Decisions taken by the routers of one process. Only ever touched from those routers' loop."""

    def __init__(self) -> None:
        self._tally: Tally[str] = Tally({reason.value: 0 for reason in Reason})
        self._metric = metrics.Counter(ROUTING_DECISIONS.name, ROUTING_DECISIONS.meaning, ROUTING_DECISIONS.labels)
        self._delay = metrics.Histogram(NEWS_DELAY.name, NEWS_DELAY.meaning, boundaries=DELAY_BOUNDS)
        self._age = metrics.Gauge(NEWS_AGE.name, NEWS_AGE.meaning)

    def count(self, reason: Reason) -> None:
        """One request was given to a replica for this reason."""
        self._tally[reason.value] += 1
        self._metric.inc(tags={"reason": reason.value})

    def heard(self, age_s: float, delay_s: float | None) -> None:
        """A router asked its hub, of which it had not heard for ``age_s``. delay_s: of the oldest news that came."""
        self._age.set(age_s)
        if delay_s is not None:
            self._delay.observe(delay_s)

    def as_dict(self) -> dict[str, int]:
        """Totals by reason since the process started."""
        return dict(self._tally)


counters = RoutingCounters()

"""Where requests find their adapters, against why the router sent them here: whether what it believed was so."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from deployments.observability.catalog import ARRIVALS
from deployments.routing.fleet_view import Tier


class Arrivals:
    """Counts for Prometheus. Made in a Serve replica."""

    def __init__(self) -> None:
        labels: Any = ARRIVALS.labels  # Serve's annotation says one, its code takes any number
        self._counter = metrics.Counter(ARRIVALS.name, ARRIVALS.meaning, labels)

    def count(self, reason: str, found: Tier | None) -> None:
        """A request came that was routed for this reason."""
        self._counter.inc(tags={"reason": reason, "found": "nowhere" if found is None else found.value})

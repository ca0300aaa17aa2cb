"""Where requests find their adapters, against why the router sent them here: whether what it believed was so."""

from __future__ import annotations

from ray.serve import metrics

from deployments.routing.fleet_view import Tier


class Arrivals:
    """Counts for Prometheus. Made in a Serve replica."""

    def __init__(self) -> None:
        self._counter = metrics.Counter(
            "lorafleet_arrivals_total",
            "Requests for adapters: why the router chose this replica, and where the adapter was when they came.",
            ("reason", "found"),  # pyright: ignore[reportArgumentType] (Serve takes any number)
        )

    def count(self, reason: str, found: Tier | None) -> None:
        """A request came that was routed for this reason."""
        self._counter.inc(tags={"reason": reason, "found": "nowhere" if found is None else found.value})

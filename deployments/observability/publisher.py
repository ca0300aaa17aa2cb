"""Readings of numbers that something else counts, passed on to Ray every second or two, and so to Prometheus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from itertools import accumulate
from typing import Any

from ray.serve import metrics

from deployments.background import Background
from deployments.observability.catalog import Metric
from engine.histogram import Distribution

#: By name and the values of its labels: what is now (gauges), or what there was since the start.
Reading = dict[tuple[str, ...], float | Distribution]

logger = logging.getLogger("ray.serve")


class MetricPublisher(Background):
    """Asks for a reading every ``period_s`` and publishes it. Requests and steps pay nothing for that.

    A histogram is published as gauges that are called what Prometheus calls a histogram's series. Ray's own takes
    3 µs for every value and makes up the sum; so it is exact, and as cheap for a million values as for one.
    """

    def __init__(self, metrics_: Iterable[Metric], read: Callable[[], Awaitable[Reading]], period_s: float) -> None:
        """Call it in a Serve replica, and ``start`` on its running loop."""
        self._metrics = {metric.name: metric for metric in metrics_}
        self._read = read
        self._period_s = period_s
        self._counted: dict[tuple[str, ...], float] = {}
        self._series: dict[str, Any] = {}
        for metric in self._metrics.values():
            self._series |= _series(metric)

    def publish(self, reading: Reading) -> None:
        """Pass a reading on to Ray. Raises KeyError for a metric that was not named before."""
        for key, value in reading.items():
            metric = self._metrics[key[0]]
            labels = dict(zip(metric.labels, key[1:], strict=True))
            if isinstance(value, Distribution):
                self._histogram(metric.name, labels, value)
            elif metric.kind == "gauge":
                self._series[metric.name].set(value, labels)
            elif (grown := value - self._counted.get(key, 0.0)) > 0:
                self._series[metric.name].inc(grown, labels)
                self._counted[key] = value

    def _histogram(self, name: str, labels: dict[str, str], seen: Distribution) -> None:
        names = [f"{bound:g}" for bound in seen.bounds] + ["+Inf"]
        for bound, count in zip(names, accumulate(seen.counts), strict=True):
            self._series[f"{name}_bucket"].set(count, {**labels, "le": bound})
        self._series[f"{name}_sum"].set(seen.total, labels)
        self._series[f"{name}_count"].set(seen.count, labels)

    async def _run(self) -> None:
        while True:
            try:
                self.publish(await self._read())
            except Exception:  # metrics must not be what stops a replica
                logger.exception("metrics could not be published")
            await asyncio.sleep(self._period_s)


def _series(metric: Metric) -> dict[str, Any]:
    """Ray's metrics behind one of ours. Serve's annotation asks for a tuple of one label, its code takes any number."""
    labels: Any = metric.labels
    if metric.kind == "counter":
        return {metric.name: metrics.Counter(metric.name, metric.meaning, labels)}
    if metric.kind == "gauge":
        return {metric.name: metrics.Gauge(metric.name, metric.meaning, labels)}
    parts: dict[str, Any] = {"_bucket": (*labels, "le"), "_sum": labels, "_count": labels}
    return {metric.name + part: metrics.Gauge(metric.name + part, metric.meaning, of) for part, of in parts.items()}

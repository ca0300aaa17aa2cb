"""Where adapters are: what replicas report, and what a router makes of it.

Pure state, no Ray. ``residency_feed`` carries it between processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

KEY_LENGTH = 16  # hex digits: 64 bits of a digest are plenty for a hint and a quarter of the bytes on the wire


def short_key(digest: str) -> str:
    """The part of an adapter's digest that residency news carries. A hint: never used to serve weights."""
    return digest[:KEY_LENGTH]


@dataclass(frozen=True, slots=True)
class ReplicaNews:
    """One replica's report. It replaces every earlier one of the same replica.

    replica: unique id of the Serve replica. version: grows with every report of one replica. resident,
    host_cached: short keys of adapters in its slots and in its host cache. running, waiting: requests.
    saturated: its queue is full. draining: it is shutting down.
    """

    replica: str
    version: int
    resident: frozenset[str] = frozenset()
    host_cached: frozenset[str] = frozenset()
    running: int = 0
    waiting: int = 0
    saturated: bool = False
    draining: bool = False


@dataclass(slots=True)
class ResidencyView:
    """What one router believes: the latest report of every replica, and its own decisions since.

    A decision makes an adapter resident soon, so it counts as resident for ``prediction_ttl_s`` (requests
    that follow within a load must not scatter). After that only reports count: a prediction that did not
    come true (a load that failed) costs at most that long.
    """

    prediction_ttl_s: float = 1.0
    news: dict[str, ReplicaNews] = field(default_factory=dict)
    _predicted: dict[tuple[str, str], float] = field(default_factory=dict)  # (replica, key) -> expiry

    def apply(self, reports: Iterable[ReplicaNews]) -> None:
        """Take in reports; one that is older than what is known is ignored."""
        for report in reports:
            known = self.news.get(report.replica)
            if known is None or report.version > known.version:
                self.news[report.replica] = report

    def predict(self, replica: str, digest: str, now: float) -> None:
        """A request for this adapter was just given to this replica."""
        key = (replica, short_key(digest))
        self._predicted.pop(key, None)  # re-insert at the end: the dict stays ordered by expiry
        self._predicted[key] = now + self.prediction_ttl_s
        while (oldest := next(iter(self._predicted), None)) and self._predicted[oldest] <= now:
            del self._predicted[oldest]

    def is_resident(self, replica: str, digest: str, now: float) -> bool:
        """Whether the adapter is, or is about to be, in a slot of the replica."""
        key = short_key(digest)
        known = self.news.get(replica)
        return (known is not None and key in known.resident) or self._predicted.get((replica, key), 0.0) > now

    def is_host_cached(self, replica: str, digest: str) -> bool:
        """Whether the adapter is in the replica's host memory."""
        known = self.news.get(replica)
        return known is not None and short_key(digest) in known.host_cached

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget every replica that is not in ``replicas``."""
        alive = set(replicas)
        self.news = {name: report for name, report in self.news.items() if name in alive}
        self._predicted = {key: expiry for key, expiry in self._predicted.items() if key[0] in alive}

    def forget(self, replica: str) -> None:
        """The replica died."""
        self.news.pop(replica, None)
        self._predicted = {key: expiry for key, expiry in self._predicted.items() if key[0] != replica}

"""From what replicas tell to one picture of the fleet: names, sums, rates. Pure: no clock, no Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

TOKEN_SECONDS = 3.0  # tokens a second are a mean over so long
WINDOW_SECONDS = 60.0  # loads and hits
MOST_TENANTS = 32
MOST_SLOTS = 4096  # of the whole fleet in one picture
NAME_LENGTH = 96  # what tenants choose may be as long as they like


class _Reading(NamedTuple):
    clock: float
    generated: int
    hits: int
    misses: int
    loads: int


class FleetPicture:
    """Remembers a minute of readings, for as long as one is taken after the other."""

    def __init__(self, label: Callable[[str], str]) -> None:
        """label: what an operator calls the adapter that a replica calls by its reference."""
        self._label = label
        self._readings: dict[str, deque[_Reading]] = {}

    def take(self, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """views: of every replica that answered, as ``ReplicaView.read`` has them. Rates are None at first."""
        views = sorted(views, key=lambda view: view["replica"])
        self._readings = {view["replica"]: self._readings.get(view["replica"], deque()) for view in views}
        left = MOST_SLOTS
        replicas = []
        for view in views:
            shown = list(islice(view["slots"], left))
            left -= len(shown)
            replicas.append(self._replica(view, shown))
        tenants: Counter[str] = Counter()
        for view in views:
            tenants.update(dict(view["tenants"]))
        return {
            "replicas": replicas,
            "totals": self._totals(replicas),
            "tenants": [[short(self._label(name)), count] for name, count in tenants.most_common(MOST_TENANTS)],
            # Replicas tell of those with most, so of what they leave out nobody knows who is the same.
            "waiting_tenants": max([len(tenants), *(view["waiting_tenants"] for view in views)]),
        }

    def _replica(self, view: Mapping[str, Any], slots: Sequence[Sequence[Any]]) -> dict[str, Any]:
        now = _Reading(*(view[name] for name in _Reading._fields))
        readings = self._readings[view["replica"]]
        readings.append(now)
        while now.clock - readings[0].clock > WINDOW_SECONDS:
            readings.popleft()
        before = next(one for one in readings if now.clock - one.clock <= TOKEN_SECONDS)
        oldest = readings[0]
        same = ("running", "max_rows", "waiting", "waiting_for_adapter", "longest_wait_s", "pages", "draining", "node")
        same += ("device", "host_adapters", "host_bytes", "host_budget_bytes", "slots_total", "slots_filled")
        same += ("slots_in_use", "hits", "misses", "generated")
        return {name: view[name] for name in same} | {
            "id": view["replica"],
            "version": view["version"],
            "pages_used": view["pages"] - view["free_pages"],
            "step_ms": 1000 * view["step_s"],
            "tokens_s": _rate(now.generated - before.generated, now.clock - before.clock),
            "loads_min": _rate(60 * (now.loads - oldest.loads), now.clock - oldest.clock),
            "recent_hits": now.hits - oldest.hits,
            "recent_misses": now.misses - oldest.misses,
            "slots": [[one[0]] if len(one) == 1 else [one[0], short(self._label(one[1])), *one[2:]] for one in slots],
        }

    @staticmethod
    def _totals(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        summed = ("running", "max_rows", "waiting", "waiting_for_adapter", "pages", "pages_used", "hits", "misses")
        summed += ("recent_hits", "recent_misses", "slots_total", "slots_filled", "slots_in_use", "tokens_s")
        summed += ("loads_min",)
        totals: dict[str, Any] = {}
        for name in summed:
            values = [one[name] for one in replicas if one[name] is not None]
            totals[name] = sum(values) if values or name not in {"tokens_s", "loads_min"} else None
        return totals | {
            "hit_rate": _share(totals["hits"], totals["misses"]),
            "recent_hit_rate": _share(totals["recent_hits"], totals["recent_misses"]),
        }


def short(name: str) -> str:
    """At most ``NAME_LENGTH`` characters of it."""
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None

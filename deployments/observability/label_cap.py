"""A bound on how many adapters have a label of their own in metrics."""

from __future__ import annotations

from collections import Counter

OTHER = "other"
_REMEMBERED = 8  # times ``top``: names whose counts are kept to find out who is busy


class LabelCap:
    """Labels for names, never more than ``2 * top`` of them and OTHER, however many names there are.

    The first ``top`` names get a label each. A name that comes later gets one when it is among the ``top`` busiest, as
    long as labels are left: a label that was given stays, as a series that was begun cannot be taken back.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._labels: set[str] = set()
        self._counts: Counter[str] = Counter()

    def label(self, name: str, weight: int = 1) -> str:
        """What to call ``name``, which was just used ``weight`` times. The name itself, or OTHER."""
        if self._top == 0:
            return OTHER
        self._count(name, weight)
        if name in self._labels:
            return name
        if len(self._labels) < self._top or (len(self._labels) < 2 * self._top and self._is_busy(name)):
            self._labels.add(name)
            return name
        return OTHER

    def _count(self, name: str, weight: int) -> None:
        """Space-saving: a new name takes the place, and the count, of the least used one."""
        if name not in self._counts and len(self._counts) >= _REMEMBERED * self._top:
            least, count = min(self._counts.items(), key=lambda item: item[1])
            del self._counts[least]
            self._counts[name] = count
        self._counts[name] += weight

    def _is_busy(self, name: str) -> bool:
        own = self._counts[name]
        return sum(count >= own for other, count in self._counts.items() if other != name) < self._top

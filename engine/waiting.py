"""Who waits to be admitted, and in which order."""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections.abc import Iterable, Iterator

from engine.fairness import TokenCounters
from engine.sequence import Sequence

Order = tuple[int, float, int]
LAST: Order = (3, 0.0, 0)  # after everyone who waits


class WaitingQueue:
    """Sequences by tenant. The order of all: rows that were preempted; then those that are old, by arrival; then by the
    counter of the tenant, and by arrival where counters are equal. So with one tenant it is the order of arrival.

    Of each tenant only the first ages, by each admission of another tenant's later arrival; at ``max_overtakes`` it is
    old. So others that keep coming, however many, do not keep a tenant with a large counter out for ever, and a long
    queue of one tenant does not come before everybody else.
    """

    def __init__(self, counters: TokenCounters, max_overtakes: int) -> None:
        self._counters = counters
        self._max_overtakes = max_overtakes
        self._tenants: dict[str, list[Sequence]] = {}
        self._size = 0
        #: Grows with every sequence that comes or goes.
        self.changes = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """Everyone, one tenant after the other."""
        for line in list(self._tenants.values()):
            yield from list(line)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._tenants.get(sequence.tenant, ())

    def add(self, sequence: Sequence) -> None:
        """Queue it at its place."""
        line = self._tenants.get(sequence.tenant)
        if line is None:
            if not sequence.preempted:
                self._counters.lift(sequence.tenant, self._tenants)
            line = self._tenants[sequence.tenant] = []
        if sequence.request.tenant and sequence.request.share is not None:
            self._counters.set_share(sequence.tenant, sequence.request.share)
        sequence.waits_since = time.monotonic()
        sequence.queued_at = sequence.queued_at or sequence.waits_since
        insort(line, sequence, key=_in_line)
        self._size += 1
        self.changes += 1

    def remove(self, sequence: Sequence) -> None:
        """Take it out."""
        line = self._tenants[sequence.tenant]
        line.remove(sequence)
        self._size -= 1
        self.changes += 1
        if not line:
            del self._tenants[sequence.tenant]
            self._counters.leave(sequence.tenant)

    def admit(self, sequence: Sequence, passed: Iterable[Sequence]) -> None:
        """Take it out to run. passed: those before it in the order that had no slot to go to."""
        self.remove(sequence)
        if not sequence.preempted:
            self._counters.prompt(sequence.tenant, sequence.prompt_tokens)
        for tenant, line in self._tenants.items():
            line[0].age += tenant != sequence.tenant and line[0].arrival < sequence.arrival
        for earlier in passed:
            earlier.overtaken += 1

    def ordered(self) -> Iterator[Sequence]:
        """Everyone in order. The one given out last may be removed meanwhile, and counters may grow."""
        lines = {tenant: list(line) for tenant, line in self._tenants.items()}
        heap = [(self._order(line, 0), tenant, 0) for tenant, line in lines.items()]
        heapq.heapify(heap)
        while heap:
            _, tenant, place = heap[0]
            line = lines[tenant]
            yield line[place]
            if place + 1 < len(line):
                heapq.heapreplace(heap, (self._order(line, place + 1), tenant, place + 1))
            else:
                heapq.heappop(heap)

    def order(self, sequence: Sequence) -> Order:
        """Its place, for comparing with others': of those who wait, and of one who would have to come to wait."""
        line = self._tenants.get(sequence.tenant, [sequence])
        return self._order([sequence], 0) if line[0] is sequence else self._order([line[0], sequence], 1)

    def tenants(self) -> dict[str, int]:
        """How many of each tenant wait. Any thread."""
        return {tenant: len(line) for tenant, line in self._tenants.copy().items()}

    def longest_s(self) -> float:
        """Seconds that the one who waits longest has waited so far; 0 when nobody waits. Any thread."""
        since = [sequence.waits_since for line in self._tenants.copy().values() for sequence in line.copy()]
        return time.monotonic() - min(since) if since else 0.0

    def _order(self, line: list[Sequence], place: int) -> Order:
        sequence = line[place]
        if sequence.preempted:
            return 0, 0.0, sequence.arrival
        if place == 0 and sequence.age >= self._max_overtakes:
            return 1, 0.0, sequence.arrival
        return 2, self._counters[sequence.tenant], sequence.arrival


def _in_line(sequence: Sequence) -> tuple[bool, int]:
    return not sequence.preempted, sequence.arrival

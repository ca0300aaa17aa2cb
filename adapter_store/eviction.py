"""Which adapter goes when room is needed: what every cache of adapters, in slots or host memory, asks of a policy."""

from __future__ import annotations

from collections.abc import Callable
from heapq import nlargest
from math import inf, log2
from typing import Literal, Protocol, get_args

EvictionName = Literal["lru", "cost"]
EVICTION_NAMES: tuple[str, ...] = get_args(EvictionName)
_LEAST_SECONDS = 1e-3  # what any reload takes, where it was not measured
# Four caches of 8 under Zipf's law (200 adapters) miss 0.340 with a half-life of 16 uses for each adapter held, 0.348
# with 8 and 0.336 with 128, which takes eight times as long to let go of what nobody asks for any more; lru 0.447.
HALF_LIFE = 16
REMEMBERED = 16  # evicted adapters whose uses are remembered, for each adapter held


class EvictionPolicy(Protocol):
    """Values what one cache holds. The cache decides what may go at all (references, pins); of that, the least
    valued goes. Not thread-safe."""

    def added(self, digest: str, size: int, cost: float) -> None:
        """It is held now, as just used. size: its bytes. cost: seconds that bringing it back took."""
        ...

    def used(self, digest: str) -> None:
        """A request found it."""
        ...

    def released(self, digest: str) -> None:
        """A request is done with it."""
        ...

    def removed(self, digest: str, *, evicted: bool) -> None:
        """It is held no more. evicted: to make room, as against for being asked to."""
        ...

    def value(self, digest: str) -> float:
        """What it is worth to keep it: the least goes first."""
        ...


class LeastRecentlyUsed:
    """The one whose last use is longest ago goes first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[str, int] = {}

    def added(self, digest: str, size: int, cost: float) -> None:
        self.used(digest)

    def used(self, digest: str) -> None:
        self._clock += 1
        self._last[digest] = self._clock

    def released(self, digest: str) -> None:
        self.used(digest)

    def removed(self, digest: str, *, evicted: bool) -> None:
        del self._last[digest]

    def value(self, digest: str) -> float:
        return self._last[digest]


class FadingUses:
    """Uses x cost / size, where a use counts for half after each ``HALF_LIFE`` uses of the cache for everything held.

    Uses that fade: LRFU (Lee et al., "LRFU: a spectrum of policies that subsumes the least recently used and least
    frequently used policies", IEEE Transactions on Computers 50-12, 2001); cost / size as in Cherkasova's
    Greedy-Dual-Size-Frequency (HP Labs HPL-98-69R1, 1998). What is small, asked for often or slow to bring back stays
    longer; what was and is not any more fades. Uses of what was evicted are remembered: else an adapter that is not
    asked for again while it passes through would count anew each time, and never come to stay.
    """

    def __init__(self) -> None:
        self._clock = 0.0  # half-lives gone by
        self._uses: dict[str, float] = {}  # of what is held: log2(sum of 2 ** clock at each use)
        self._weight: dict[str, float] = {}  # of what is held: log2(cost / size)
        self._before: dict[str, float] = {}  # uses of what was evicted

    def added(self, digest: str, size: int, cost: float) -> None:
        self._uses[digest] = self._before.pop(digest, -inf)
        self._weight[digest] = log2(max(cost, _LEAST_SECONDS) / max(size, 1))
        self.used(digest)

    def used(self, digest: str) -> None:
        self._clock += 1 / (HALF_LIFE * len(self._uses))
        more, less = self._clock, self._uses[digest]
        self._uses[digest] = more + log2(1 + 2 ** (less - more))  # no sum ever overflows

    def released(self, digest: str) -> None:
        pass

    def removed(self, digest: str, *, evicted: bool) -> None:
        uses = self._uses.pop(digest)
        del self._weight[digest]
        if evicted:
            self._before[digest] = uses
            self._forget()

    def value(self, digest: str) -> float:
        return self._uses[digest] + self._weight[digest]

    def _forget(self) -> None:
        kept = REMEMBERED * (len(self._uses) + 1)
        if len(self._before) > 2 * kept:  # not each time, for this looks at all of them
            most = nlargest(kept, self._before, key=self._before.__getitem__)
            self._before = {digest: self._before[digest] for digest in most}


def eviction_policy(name: str) -> Callable[[], EvictionPolicy]:
    """Makes a policy for each cache that asks. Raises ValueError for a name that is none of ``EVICTION_NAMES``."""
    policies: dict[str, Callable[[], EvictionPolicy]] = {"lru": LeastRecentlyUsed, "cost": FadingUses}
    if name not in policies:
        raise ValueError(f"eviction is {name!r} but must be one of {', '.join(EVICTION_NAMES)}")
    return policies[name]

"""Which adapter goes when room is needed: what every cache of adapters, in slots or host memory, asks of a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

EvictionName = Literal["lru", "cost"]
EVICTION_NAMES: tuple[str, ...] = get_args(EvictionName)
_LEAST_SECONDS = 1e-3  # what any reload takes, where it was not measured


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


class GreedyDualSizeFrequency:
    """Uses x cost / size, and age: value = age + uses * cost / size, where age is the value of what was evicted last.

    After Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs
    HPL-98-69R1, 1998). What is small, asked for often or slow to bring back stays longer; what was and is not any more
    is overtaken by the age and goes in the end.
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._uses: dict[str, int] = {}
        self._weight: dict[str, float] = {}  # cost / size
        self._value: dict[str, float] = {}

    def added(self, digest: str, size: int, cost: float) -> None:
        self._uses[digest], self._weight[digest] = 0, max(cost, _LEAST_SECONDS) / max(size, 1)
        self.used(digest)

    def used(self, digest: str) -> None:
        self._uses[digest] += 1
        self._value[digest] = self._age + self._uses[digest] * self._weight[digest]

    def released(self, digest: str) -> None:
        self._value[digest] = self._age + self._uses[digest] * self._weight[digest]

    def removed(self, digest: str, *, evicted: bool) -> None:
        value = self._value.pop(digest)
        if evicted:
            self._age = max(self._age, value)
        del self._uses[digest], self._weight[digest]

    def value(self, digest: str) -> float:
        return self._value[digest]


def eviction_policy(name: str) -> Callable[[], EvictionPolicy]:
    """Makes a policy for each cache that asks. Raises ValueError for a name that is none of ``EVICTION_NAMES``."""
    policies: dict[str, Callable[[], EvictionPolicy]] = {"lru": LeastRecentlyUsed, "cost": GreedyDualSizeFrequency}
    if name not in policies:
        raise ValueError(f"eviction is {name!r} but must be one of {', '.join(EVICTION_NAMES)}")
    return policies[name]

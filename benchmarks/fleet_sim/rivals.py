"""Other ways to route: at random, and what Ray Serve 2.60 has, after its source.

Power of two, multiplexed model ids and consistent hashing as in ``ray.serve._private.request_router`` and
``ray.serve.experimental.consistent_hash_router``, without what only a real cluster has: probing takes no time, and a
router's queue-length cache is right at the moment when it sends.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence

import mmh3

from benchmarks.fleet_sim.policies import QueueLengths
from benchmarks.fleet_sim.replica import SimReplica

VIRTUAL_NODES = 100  # Ray's default
FALLBACKS = 2  # Ray's default
HASH_SEED = 0xF9B4CA77  # Ray's
MODEL_IDS_DELAY_S = 0.118  # from a load to the routers' tables, the median measured on a live cluster


class RandomChoice:
    """Any replica."""

    report_s: float | None = None
    delay_s = 0.0

    def __init__(self, routers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._replicas: Sequence[SimReplica] = ()
        self._lengths = [QueueLengths() for _ in range(routers)]

    def replicas_are(self, replicas: Sequence[SimReplica]) -> None:
        self._replicas = tuple(replicas)

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        return [self._random.choice(self._replicas).name]

    def sent(self, router: int, replica: SimReplica, adapter: str, now: float) -> None:
        self._lengths[router].sent(replica, now)

    def finished(self, router: int, replica: SimReplica, adapter: str) -> None:
        self._lengths[router].finished(replica)

    def news(self, replica: SimReplica) -> object:
        raise AssertionError("nobody listens")

    def heard(self, replica: SimReplica, news: object, now: float) -> None:
        raise AssertionError("nobody listens")

    def _shorter_of_two(self, router: int, replicas: Sequence[SimReplica], now: float) -> list[str]:
        two = replicas if len(replicas) < 2 else self._random.sample(replicas, 2)
        lengths = self._lengths[router]
        return [replica.name for replica in sorted(two, key=lambda replica: lengths.get(replica, now))]


class PowerOfTwo(RandomChoice):
    """The less busy of two drawn replicas: Serve's default for requests without a model id."""

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        return self._shorter_of_two(router, self._replicas, now)


class ServeMultiplex(RandomChoice):
    """Serve's default for requests with a model id: the less busy of two of the replicas that list the model; of those
    with the fewest models when none does, or when they are full; of all, after that."""

    report_s: float | None = 0.1
    delay_s = MODEL_IDS_DELAY_S - 0.05  # the pusher's period of 0.1 s adds half of itself

    def __init__(self, routers: int, seed: int) -> None:
        super().__init__(routers, seed)
        self._models: dict[SimReplica, set[str]] = {}
        self._listed: dict[str, set[SimReplica]] = {}
        self._by_count: dict[int, set[SimReplica]] = {}

    def replicas_are(self, replicas: Sequence[SimReplica]) -> None:
        super().replicas_are(replicas)
        self._models = {replica: self._models.get(replica, set()) for replica in replicas}
        self._listed, self._by_count = {}, {}
        for replica, models in self._models.items():
            self._by_count.setdefault(len(models), set()).add(replica)
            for model in models:
                self._listed.setdefault(model, set()).add(replica)

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        listed = self._listed.get(adapter)
        fewest = self._by_count[min(self._by_count)]
        tries = self._shorter_of_two(router, _sequence(listed), now) if listed else []
        everywhere = self._replicas if len(fewest) == len(self._replicas) else _sequence(fewest)
        tries += self._shorter_of_two(router, everywhere, now)
        return [*tries, *self._shorter_of_two(router, self._replicas, now)]

    def news(self, replica: SimReplica) -> object:
        replica.take_changes()
        return set(replica.slots)

    def heard(self, replica: SimReplica, news: object, now: float) -> None:
        assert isinstance(news, set)
        before = self._models.get(replica)
        if before is None:
            return
        for model in before - news:
            self._listed[model].discard(replica)
            if not self._listed[model]:
                del self._listed[model]
        for model in news - before:
            self._listed.setdefault(model, set()).add(replica)
        if len(before) != len(news):
            self._by_count[len(before)].discard(replica)
            if not self._by_count[len(before)]:
                del self._by_count[len(before)]
            self._by_count.setdefault(len(news), set()).add(replica)
        self._models[replica] = news


class ConsistentHash(RandomChoice):
    """A ring of hashes with the adapter as the session; the next two on the ring when a replica is full."""

    def __init__(self, routers: int, seed: int) -> None:
        super().__init__(routers, seed)
        self._ring: list[int] = []
        self._owners: list[str] = []

    def replicas_are(self, replicas: Sequence[SimReplica]) -> None:
        super().replicas_are(replicas)
        ring = sorted((_hash(f"{one.name}:{node}"), one.name) for one in replicas for node in range(VIRTUAL_NODES))
        self._ring, self._owners = [place for place, _ in ring], [name for _, name in ring]

    def choose(self, router: int, adapter: str, avoid: frozenset[str], now: float) -> Sequence[str]:
        start = bisect_right(self._ring, _hash(adapter))
        found: list[str] = []
        for step in range(len(self._ring)):
            owner = self._owners[(start + step) % len(self._ring)]
            if owner not in found:
                found.append(owner)
            if len(found) == min(1 + FALLBACKS, len(self._replicas)):
                break
        return found


def _sequence(replicas: set[SimReplica]) -> list[SimReplica]:
    return sorted(replicas, key=lambda replica: replica.name)  # sets of objects have no order to rely on


def _hash(key: str) -> int:
    return mmh3.hash64(key.encode(), seed=HASH_SEED, signed=False)[0]

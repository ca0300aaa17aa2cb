"""A fleet under traffic, event by event."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from adapter_store.eviction import EvictionPolicy
from benchmarks.fleet_sim.policies import RoutingPolicy
from benchmarks.fleet_sim.replica import ReplicaShape, Request, SimReplica
from benchmarks.fleet_sim.service_times import ServiceTimes
from benchmarks.fleet_sim.traffic import Traffic

RETRY_S, LONGEST_RETRY_S = 0.05, 0.5  # pauses while every replica that may be asked is full: doubled each time
NOTICE_S = 0.1  # until routers know that a replica died, or runs again
FAILED_TRY_S = 0.005  # a call to a dead replica


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica that dies; ``back_after`` seconds later another one takes its place, empty."""

    at: float
    replica: int
    back_after: float = 30.0


@dataclass(slots=True)
class Outcome:
    """What happened to the requests, by their number. first_tokens: seconds; inf for one that was lost."""

    first_tokens: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]
    load_times: list[float] = field(default_factory=list)
    decision_s: array[float] = field(default_factory=lambda: array("d"))  # CPU time of each
    tries: int = 0  # requests refused by a full or dead replica and tried again
    lost: int = 0  # requests that had begun when their replica died
    busy: float = 0.0  # mean share of max_rows that ran, over replicas, sampled at arrivals


@lru_cache(1 << 18)
def adapter_key(number: int) -> str:
    """An adapter's short key: as evenly spread as a digest's beginning."""
    return blake2b(number.to_bytes(8, "little"), digest_size=8).hexdigest()


class Simulation:
    """One policy, one fleet, one stream of requests.

    A request goes to one of the routers at random. Replicas' news go to all of them, ``policy.delay_s`` later.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        replicas: int,
        routers: int,
        shape: ReplicaShape,
        times: ServiceTimes,
        eviction: Callable[[], EvictionPolicy],
        seed: int = 0,
    ) -> None:
        self._policy = policy
        self._new = lambda name: SimReplica(name, shape, times, eviction())
        self._fleet = [self._new(f"replica-{number:04}") for number in range(replicas)]
        self._known = {replica.name: replica for replica in self._fleet}
        self._routers = routers
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._due: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._untold: set[str] = set()
        self._now = 0.0

    def run(self, traffic: Traffic, failures: tuple[Failure, ...] = ()) -> Outcome:
        """Until the last request is complete."""
        self._traffic = traffic
        count = len(traffic.times)
        self._outcome = Outcome(np.full(count, np.inf), np.zeros(count, np.bool_))
        self._policy.replicas_are(self._fleet)
        for failure in failures:
            self._at(failure.at, lambda failure=failure: self._kill(failure))
        arrivals = zip(traffic.times.tolist(), traffic.adapters.tolist(), traffic.tokens.tolist(), strict=True)
        for number, (when, adapter, tokens) in enumerate(arrivals):
            self._until(when)
            self._now = when
            request = Request(number, adapter_key(adapter), tokens, when, self._random.randrange(self._routers))
            self._route(request, frozenset())
            if not number % 64:
                self._outcome.busy += sum(replica.running / replica.shape.max_rows for replica in self._fleet) / len(
                    self._fleet
                )
        self._until(np.inf)
        self._outcome.busy /= max(-(-count // 64), 1)
        return self._outcome

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def _until(self, when: float) -> None:
        events = self._events
        while events and events[0][0] <= when:
            self._now, _, action = heapq.heappop(events)
            action()

    def _route(self, request: Request, avoid: frozenset[str], pause: float = RETRY_S) -> None:
        outcome, policy = self._outcome, self._policy
        begun = time.thread_time()
        names = policy.choose(request.router, request.adapter, avoid, self._now)
        outcome.decision_s.append(time.thread_time() - begun)
        for name in names:
            replica = self._known[name]
            if not replica.alive:
                outcome.tries += 1
                self._at(self._now + FAILED_TRY_S, partial(self._route, request, avoid | {name}))
                return
            if not replica.full:
                self._give(request, replica)
                return
            outcome.tries += 1
        self._at(self._now + pause, partial(self._route, request, frozenset(), min(2 * pause, LONGEST_RETRY_S)))

    def _give(self, request: Request, replica: SimReplica) -> None:
        loads = replica.loads
        request.hit = request.adapter in replica.slots
        replica.accept(request, self._now)
        self._outcome.load_times += [self._now] * (replica.loads - loads)
        self._policy.sent(request.router, replica, request.adapter, self._now)
        self._follow(replica)

    def _follow(self, replica: SimReplica) -> None:
        """See that the replica is called when it is due, and that its news get told."""
        due = replica.next_event()
        if due < self._due.get(replica.name, np.inf):
            self._due[replica.name] = due
            self._at(due, lambda: self._advance(replica, due))
        if self._policy.report_s is not None and replica.name not in self._untold:
            self._untold.add(replica.name)
            self._at(
                max(self._now, self._told.get(replica.name, 0.0) + self._policy.report_s), lambda: self._tell(replica)
            )

    def _advance(self, replica: SimReplica, due: float) -> None:
        if not replica.alive or self._due.get(replica.name) != due:
            return
        del self._due[replica.name]
        loads = replica.loads
        for request in replica.advance(self._now):
            self._outcome.first_tokens[request.number] = request.first - request.arrived
            self._outcome.hits[request.number] = request.hit
            self._policy.finished(request.router, replica, request.adapter)
        self._outcome.load_times += [self._now] * (replica.loads - loads)
        self._follow(replica)

    def _tell(self, replica: SimReplica) -> None:
        self._untold.discard(replica.name)
        if replica.alive:
            self._told[replica.name] = self._now
            news = self._policy.news(replica)
            self._at(self._now + self._policy.delay_s, lambda: self._policy.heard(replica, news, self._now))

    def _kill(self, failure: Failure) -> None:
        replica = self._fleet[failure.replica]
        for request in replica.kill():
            self._policy.finished(request.router, replica, request.adapter)
            if request.first <= self._now:
                self._outcome.lost += 1
            else:
                request.first = np.inf
                self._at(
                    self._now + FAILED_TRY_S, lambda request=request: self._route(request, frozenset({replica.name}))
                )
        self._fleet = [other for other in self._fleet if other is not replica]
        self._at(self._now + NOTICE_S, lambda: self._policy.replicas_are(self._fleet))
        self._at(self._now + failure.back_after, lambda: self._start(f"{replica.name}-again"))

    def _start(self, name: str) -> None:
        fresh = self._known[name] = self._new(name)
        self._fleet = [*self._fleet, fresh]
        self._at(self._now + NOTICE_S, lambda: self._policy.replicas_are(self._fleet))

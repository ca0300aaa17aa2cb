"""One replica in a simulation: continuous batching, adapter slots, a host cache, one copy stream, some disk readers."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from math import inf

from adapter_store.eviction import EvictionPolicy
from benchmarks.fleet_sim.service_times import ServiceTimes
from engine.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class ReplicaShape:
    """What one replica has. readers: adapters it reads from disk at a time."""

    max_rows: int = 64
    max_waiting: int = 64
    slots: int = 64
    host_adapters: int = 256
    readers: int = EngineSettings(model="any").load_threads


@dataclass(slots=True)
class Request:
    """One request under way. first: when its first token is at the client; inf until that is settled."""

    number: int
    adapter: str
    tokens: int
    arrived: float
    router: int = 0
    hit: bool = False
    first: float = inf


@dataclass(slots=True)
class Slot:
    """An adapter's slot; ready: its weights are there. waiting: requests until then."""

    users: int = 0
    ready: bool = False
    waiting: list[Request] = field(default_factory=list)


class SimReplica:
    """Time is the caller's: every call says what time it is, and ``next_event`` when the replica wants to be called.

    The device does one thing at a time: prompts first, one after the other, then decode steps of all running rows. So
    ``_progress``, steps since the start, stands still until ``_prompts_until`` and grows by one each step from then on.
    """

    def __init__(self, name: str, shape: ReplicaShape, times: ServiceTimes, eviction: EvictionPolicy) -> None:
        self.name = name
        self.shape = shape
        self.alive = True
        self.slots: dict[str, Slot] = {}
        self.host: OrderedDict[str, None] = OrderedDict()
        self.count = 0  # requests here
        self.rows: dict[str, int] = {}  # adapter -> requests here
        self.loads = 0  # adapters brought to a slot
        self.arrivals: list[tuple[float, str, int]] = []  # (when, adapter, its load's number): loads under way
        self._slot_changes: tuple[list[str], list[str]] = ([], [])  # what came and what went
        self._host_changes: tuple[list[str], list[str]] = ([], [])
        self._times = times
        self._eviction = eviction
        self._used_slots = 0
        self._slot_waiters: deque[Request] = deque()
        self._ready: deque[Request] = deque()
        self._running: list[tuple[float, int, Request]] = []  # by the progress at which they end
        self._distinct: dict[str, int] = {}  # adapter -> rows running
        self._progress = 0.0
        self._at = 0.0
        self._prompts_until = 0.0
        self._copy_free = 0.0
        self._reader_free = [0.0] * shape.readers

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """It takes no more."""
        return self.count >= self.shape.max_rows + self.shape.max_waiting

    def unreferenced(self) -> int:
        """Slots that are empty or that no request uses."""
        return self.shape.slots - self._used_slots

    def take_changes(self) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
        """What came to the slots and what left them since the last call, and the same of the host cache.

        What came and left, or left and came, in between is in neither list.
        """
        changes = tuple(_net(*one) for one in (self._slot_changes, self._host_changes))
        self._slot_changes, self._host_changes = ([], []), ([], [])
        return changes[0], changes[1]

    def next_event(self) -> float:
        """When something happens here next, if nothing comes from outside before."""
        load = self.arrivals[0][0] if self.arrivals else inf
        return min(load, self._next_end())

    def accept(self, request: Request, now: float) -> None:
        """A request comes in. It must not be ``full``."""
        self.count += 1
        self.rows[request.adapter] = self.rows.get(request.adapter, 0) + 1
        self._take_slot(request, now)
        self._admit(now)

    def advance(self, now: float) -> list[Request]:
        """Do what is due; the requests that are complete."""
        done: list[Request] = []
        while self.arrivals and self.arrivals[0][0] <= now:
            self._loaded(heapq.heappop(self.arrivals)[1])
            self._admit(now)
        if self._next_end() <= now:
            self._settle(now)
            while self._running and self._running[0][0] <= self._progress + 1e-6:
                request = heapq.heappop(self._running)[2]
                self._release(request, now)
                done.append(request)
            self._admit(now)
        return done

    def kill(self) -> list[Request]:
        """It dies: everything that was under way here."""
        self.alive = False
        found = [entry[2] for entry in self._running] + list(self._ready) + list(self._slot_waiters)
        for slot in self.slots.values():
            found += slot.waiting
        return found

    # -- slots ---------------------------------------------------------------------------------------------

    def _take_slot(self, request: Request, now: float) -> None:
        slot = self.slots.get(request.adapter)
        if slot is None:
            if not self._make_room():
                self._slot_waiters.append(request)
                return
            slot = self.slots[request.adapter] = Slot()
            self._slot_changes[0].append(request.adapter)
            self._eviction.added(request.adapter, 1, self._times.from_disk)
            self._load(request.adapter, now)
        else:
            self._eviction.used(request.adapter)
        self._used_slots += not slot.users
        slot.users += 1
        if slot.ready:
            self._ready.append(request)
        else:
            slot.waiting.append(request)

    def _make_room(self) -> bool:
        if len(self.slots) < self.shape.slots:
            return True
        value = self._eviction.value
        unused = [(value(adapter), adapter) for adapter, slot in self.slots.items() if not slot.users]
        if not unused:
            return False
        victim = min(unused)[1]
        del self.slots[victim]
        self._eviction.removed(victim, evicted=True)
        self._slot_changes[1].append(victim)
        return True

    def _load(self, adapter: str, now: float) -> None:
        self.loads += 1
        if adapter in self.host:
            self.host.move_to_end(adapter)
            self._copy_free = max(now, self._copy_free) + self._times.copy
            ready = self._copy_free + self._times.from_host - self._times.copy
        else:
            # Reads are two orders of magnitude longer than copies, so these do not queue for the copy stream.
            read = max(now, heapq.heappop(self._reader_free)) + self._times.from_disk
            heapq.heappush(self._reader_free, read)
            ready = read + self._times.from_host
        heapq.heappush(self.arrivals, (ready, adapter, self.loads))

    def _loaded(self, adapter: str) -> None:
        slot = self.slots[adapter]
        slot.ready = True
        self._ready.extend(slot.waiting)
        slot.waiting = []
        if adapter not in self.host:
            self.host[adapter] = None
            self._host_changes[0].append(adapter)
            if len(self.host) > self.shape.host_adapters:
                self._host_changes[1].append(self.host.popitem(last=False)[0])

    def _release(self, request: Request, now: float) -> None:
        adapter = request.adapter
        self.count -= 1
        for table in (self.rows, self._distinct):
            table[adapter] -= 1
            if not table[adapter]:
                del table[adapter]
        slot = self.slots[adapter]
        slot.users -= 1
        self._eviction.released(adapter)
        if not slot.users:
            self._used_slots -= 1
            for _ in range(len(self._slot_waiters)):
                before = len(self._slot_waiters)
                self._take_slot(self._slot_waiters.popleft(), now)
                if len(self._slot_waiters) == before:  # it went to the back: there is no room
                    self._slot_waiters.rotate(1)
                    break

    # -- the device ----------------------------------------------------------------------------------------

    def _step_s(self) -> float:
        return self._times.steps[len(self._running)][len(self._distinct)]

    def _next_end(self) -> float:
        if not self._running:
            return inf
        return max(self._at, self._prompts_until) + (self._running[0][0] - self._progress) * self._step_s()

    def _settle(self, now: float) -> None:
        if self._running:
            self._progress += max(0.0, now - max(self._at, self._prompts_until)) / self._step_s()
        self._at = now

    def _admit(self, now: float) -> None:
        while self._ready and len(self._running) < self.shape.max_rows:
            self._settle(now)
            request = self._ready.popleft()
            steps = self._times.busy_steps if self._running else self._times.idle_steps
            self._prompts_until = max(now, self._prompts_until) + self._times.prefill
            heapq.heappush(self._running, (self._progress + request.tokens - 1, request.number, request))
            self._distinct[request.adapter] = self._distinct.get(request.adapter, 0) + 1
            request.first = self._prompts_until + steps * self._step_s()


def _net(came: list[str], went: list[str]) -> tuple[list[str], list[str]]:
    if not (came and went):
        return came, went
    change = Counter(came)
    change.subtract(went)
    return [one for one, by in change.items() if by > 0], [one for one, by in change.items() if by < 0]

"""What one router believes about the replicas: their news, corrected by what it did itself since.

Pure state: no Ray, no clock. ``placement.place`` reads it. What a decision reads of every replica lies in arrays,
because there may be a thousand.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.routing.adapter_demand import CopyCounts
from deployments.routing.placement_policy import PlacementPolicy

_STEP_ROWS = 32.0  # rows that a step is taken to hold until a replica says


class Tier(StrEnum):
    """Where a replica has an adapter."""

    RESIDENT = "resident"  # in a slot
    LOADING = "loading"  # on its way to a slot
    HOST = "host"  # packed in host memory


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica says of itself; it replaces what it said before.

    running, waiting: rows. max_rows: rows one step can hold. ranks: sum of the ranks in the running batch.
    free_slots: (rank of the class, slots of it that are empty or hold what no request uses), () where there is no
    telling. saturated: it takes no more. draining: it is going away. rows: rows of each adapter, running and waiting,
    by short key, each at least 1; the base model's are not among them. They are counted as they come and go, and the
    engine hears of them a step later: they may add up to more than ``running + waiting``.
    """

    running: int = 0
    waiting: int = 0
    max_rows: int = 1
    ranks: int = 0
    free_slots: tuple[tuple[int, int], ...] = ()
    saturated: bool = False
    draining: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def under_way(self) -> int:
        """Rows, running and waiting, those that the engine has yet to hear of among them."""
        return max(self.running + self.waiting, sum(self.rows.values()))

    @property
    def stage(self) -> tuple[bool, bool, bool, int]:
        """What decisions hang on: whether it takes requests, has a slot to give, and how many quarters of a step its
        rows fill."""
        return self.saturated, self.draining, self.room(), 4 * self.under_way // self.max_rows

    def room(self) -> bool:
        """Whether it has a slot to give, as far as is known."""
        return not self.free_slots or any(free for _, free in self.free_slots)


class Replica:
    """One replica as this router sees it. ``index``: its place in the view's arrays."""

    __slots__ = ("hash", "index", "load", "name", "own", "row_count", "rows", "tiers")

    def __init__(self, name: str) -> None:
        self.name = name
        self.hash = stable_hash(name)
        self.index = -1
        self.load: ReplicaLoad | None = None
        self.own: Counter[str] = Counter()  # rows this router has there, the base model's under ""
        self.rows: dict[str, int] = {}  # rows it has, by its last news and what this router did since
        self.row_count = 0  # sum of rows
        self.tiers: dict[Tier, set[str]] = {tier: set() for tier in Tier}


class FleetView:
    """See the module. Replicas go by Serve's unique id, adapters by ``residency.short_key``; "" is the base model.

    Arrays, one entry a replica, in the order of ``names``: ``hashes`` (uint64), ``loads`` and ``costs`` (float64, see
    ``PlacementPolicy``), ``closed`` (int8: 0 takes requests, 1 saturated, 2 draining), ``room`` (bool: it has a
    slot to give). News of a replica that ``keep_only`` did not name are ignored.
    """

    def __init__(self, policy: PlacementPolicy) -> None:
        self.policy = policy
        self.names: tuple[str, ...] = ()
        self.turn = 0  # requests routed: breaks ties between equally loaded replicas
        self._replicas: dict[str, Replica] = {}
        self._holders: dict[str, set[Replica]] = {}  # those with the adapter in some tier
        self._busy: dict[str, dict[Replica, int]] = {}  # adapter -> rows by replica
        self._predicted: dict[str, dict[Replica, float]] = {}  # adapter -> until when
        self._expiries: deque[tuple[float, str, Replica]] = deque()
        self._copies = CopyCounts(policy)
        self.step_rows = _STEP_ROWS  # rows a step holds, the mean over replicas that have said so
        self._size_arrays()

    # -- what is heard -------------------------------------------------------------------------------------

    def keep_only(self, replicas: Sequence[str]) -> None:
        """These are all there are. New ones count as idle and empty until they report."""
        names = tuple(sorted(set(replicas)))  # the same order in every router
        if names == self.names:
            return
        for gone in self._replicas.keys() - set(names):
            self._clear(self._replicas[gone])
            del self._replicas[gone]
        self.names = names
        for index, name in enumerate(names):
            self._replicas.setdefault(name, Replica(name)).index = index
        self._copies.keep_only(self._busy.__contains__)
        self._size_arrays()

    def report(self, replica: str, load: ReplicaLoad) -> None:
        """A replica's own account of its load. It may be from before requests that this router has there."""
        known = self._replicas.get(replica)
        if known is None:
            return
        before, known.load = known.load, load
        rows = dict(load.rows)
        if base_rows := load.under_way - sum(rows.values()):
            rows[""] = base_rows
        for adapter, count in known.own.items():
            rows[adapter] = max(rows.get(adapter, 0), count)
        self._believe(known, rows)
        self._measure(known)
        if before is None or before.max_rows != load.max_rows:
            self._assume_step_rows()

    def change(self, replica: str, tier: Tier, added: Iterable[str], removed: Iterable[str]) -> None:
        """Adapters came to a tier of a replica, or left it."""
        known = self._replicas.get(replica)
        if known is None:
            return
        for adapter in removed:
            self._leave(known, tier, adapter)
        for adapter in added:
            known.tiers[tier].add(adapter)
            self._holders.setdefault(adapter, set()).add(known)
            if tier is Tier.RESIDENT:
                self._predicted.get(adapter, {}).pop(known, None)

    def replace(self, replica: str, tier: Tier, adapters: Iterable[str]) -> None:
        """All that a replica has in a tier."""
        known = self._replicas.get(replica)
        if known is not None:
            now, then = set(adapters), known.tiers[tier]
            self.change(replica, tier, now - then, then - now)

    def forget(self, replica: str) -> None:
        """It died, or its news are too old to trust: only what this router has there itself counts."""
        known = self._replicas.get(replica)
        if known is None:
            return
        own = known.own
        self._clear(known)
        known.own = own
        self._believe(known, own)
        self._size_arrays()

    # -- what this router does -----------------------------------------------------------------------------

    def routed(self, replica: str, adapter: str, now: float) -> None:
        """A request was given to a replica: one more row there, its adapter on its way to a slot."""
        self.turn += 1
        self._expire(now)
        known = self._replicas.get(replica)
        if known is None:
            return
        known.own[adapter] += 1
        self._add_row(known, adapter, 1)
        if adapter:
            if adapter not in known.tiers[Tier.RESIDENT]:
                until = now + self.policy.prediction_ttl_s
                self._predicted.setdefault(adapter, {})[known] = until
                self._expiries.append((until, adapter, known))
            self._copies.saw(adapter, self.demand(adapter), self.step_rows, len(self.names), now)

    def finished(self, replica: str, adapter: str) -> None:
        """A request that was ``routed`` is complete, one way or another."""
        known = self._replicas.get(replica)
        if known is None or known.own[adapter] <= 0:
            return
        known.own[adapter] -= 1
        if not known.own[adapter]:
            del known.own[adapter]
        if adapter in known.rows:
            self._add_row(known, adapter, -1)

    # -- what a decision reads -----------------------------------------------------------------------------

    def demand(self, adapter: str) -> int:
        """Rows of the adapter, running and waiting, over all replicas."""
        return sum(self._busy.get(adapter, {}).values())

    def wanted(self, adapter: str) -> int:
        """How many replicas the adapter's rows ask for when one more request of it has come."""
        return self.policy.copies_for(self.demand(adapter) + 1, self.step_rows, len(self.names))

    def copies(self, adapter: str) -> int:
        """How many of its replicas should serve the adapter then: also those that it held on to after a burst."""
        return self._copies.copies(adapter, self.wanted(adapter), len(self.names))

    def holders(self, adapter: str, now: float) -> dict[Tier, list[int]]:
        """Indices of the replicas that have the adapter, each under the best tier that it has it in."""
        resident: list[int] = []
        loading: list[int] = []
        host: list[int] = []
        coming = self._busy.get(adapter, {}).keys()  # a row of it runs on a slot or waits for one
        if predicted := self._predicted.get(adapter):
            coming = coming | {replica for replica, until in predicted.items() if until > now}
        for replica in self._holders.get(adapter, set()) | coming:
            if adapter in replica.tiers[Tier.RESIDENT]:
                resident.append(replica.index)
            elif replica in coming or adapter in replica.tiers[Tier.LOADING]:
                loading.append(replica.index)
            else:
                host.append(replica.index)
        return {Tier.RESIDENT: sorted(resident), Tier.LOADING: sorted(loading), Tier.HOST: sorted(host)}

    def indices(self, replicas: Iterable[str]) -> list[int]:
        """Places in the arrays of those of the named replicas that there are."""
        return [self._replicas[name].index for name in replicas if name in self._replicas]

    # -- bookkeeping ---------------------------------------------------------------------------------------

    def _size_arrays(self) -> None:
        replicas = [self._replicas[name] for name in self.names]
        self.hashes: npt.NDArray[np.uint64] = np.array([replica.hash for replica in replicas], np.uint64)
        self.loads: npt.NDArray[np.float64] = np.zeros(len(replicas))
        self.costs: npt.NDArray[np.float64] = np.zeros(len(replicas))
        self.closed: npt.NDArray[np.int8] = np.zeros(len(replicas), np.int8)
        self.room: npt.NDArray[np.bool_] = np.ones(len(replicas), np.bool_)
        for replica in replicas:
            self._measure(replica)
        self._assume_step_rows()

    def _assume_step_rows(self) -> None:
        """What is assumed of replicas that have not said how much a step of theirs holds."""
        replicas = self._replicas.values()
        said = [replica.load.max_rows for replica in replicas if replica.load is not None]
        self.step_rows = sum(said) / len(said) if said else _STEP_ROWS
        for replica in replicas:
            if replica.load is None:
                self._weigh(replica)

    def _measure(self, replica: Replica) -> None:
        index, load = replica.index, replica.load
        self._weigh(replica)
        if load is None:
            self.closed[index], self.room[index] = 0, True
        else:
            self.closed[index] = 2 if load.draining else 1 if load.saturated else 0
            self.room[index] = load.room()

    def _weigh(self, replica: Replica) -> None:
        index, load = replica.index, replica.load
        if load is None:
            self.loads[index] = self.costs[index] = replica.row_count / self.step_rows
        else:
            self.loads[index] = replica.row_count / load.max_rows
            self.costs[index] = (replica.row_count + load.ranks * self.policy.rank_rows) / load.max_rows

    def _believe(self, replica: Replica, rows: Mapping[str, int]) -> None:
        before = replica.rows
        for adapter in before.keys() - rows.keys():
            _discard(self._busy, adapter, replica)
        for adapter, count in rows.items():
            if before.get(adapter) != count and adapter:
                self._busy.setdefault(adapter, {})[replica] = count
        replica.rows = dict(rows)
        replica.row_count = sum(rows.values())

    def _add_row(self, replica: Replica, adapter: str, change: int) -> None:
        replica.row_count += change
        count = replica.rows.get(adapter, 0) + change
        if count:
            replica.rows[adapter] = count
            if adapter:
                self._busy.setdefault(adapter, {})[replica] = count
        else:
            del replica.rows[adapter]
            _discard(self._busy, adapter, replica)
        self._weigh(replica)

    def _leave(self, replica: Replica, tier: Tier, adapter: str) -> None:
        replica.tiers[tier].discard(adapter)
        holders = self._holders.get(adapter)
        if holders is not None and not any(adapter in held for held in replica.tiers.values()):
            holders.discard(replica)
            if not holders:
                del self._holders[adapter]
        if tier is Tier.RESIDENT:
            _discard(self._predicted, adapter, replica)

    def _clear(self, replica: Replica) -> None:
        for tier, adapters in replica.tiers.items():
            for adapter in list(adapters):
                self._leave(replica, tier, adapter)
        for adapter in [adapter for adapter, until in self._predicted.items() if replica in until]:
            _discard(self._predicted, adapter, replica)
        self._believe(replica, {})
        replica.own, replica.load = Counter(), None

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            until, adapter, replica = self._expiries.popleft()
            if self._predicted.get(adapter, {}).get(replica) == until:  # not one that was renewed
                _discard(self._predicted, adapter, replica)


def _discard(table: dict[str, dict[Replica, Any]], adapter: str, replica: Replica) -> None:
    entries = table.get(adapter)
    if entries is not None:
        entries.pop(replica, None)
        if not entries:
            del table[adapter]


def stable_hash(name: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")

"""A ranking of replicas by their states: what the router used before ``placement.place``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

from deployments.placement import Reason
from deployments.placement_policy import PlacementPolicy

_SPREAD_LOAD = 4


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica as the caller sees it, for one adapter.

    key: stable identity, the same in every process. load: requests it has in flight. saturated: it said
    itself that it takes no more. draining: it is going away. resident, host_cached: where the adapter is.
    """

    key: str
    load: int = 0
    resident: bool = False
    host_cached: bool = False
    saturated: bool = False
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One place in a ranking: the index of the replica in the caller's sequence, and why it stands there."""

    index: int
    reason: Reason


def rendezvous_order(adapter: str, keys: Sequence[str]) -> tuple[int, ...]:
    """Indices of ``keys`` from the adapter's first home to its last (highest random weight hashing).

    Every process computes the same order, and a replica that comes or goes moves only the adapters that it
    takes over or leaves behind. Source: Thaler and Ravishankar, "Using name-based mappings to increase hit
    rates", 1998.
    """
    prefix = blake2b(adapter.encode(), digest_size=16)

    def weight(index: int) -> tuple[bytes, str]:
        hashed = prefix.copy()
        hashed.update(keys[index].encode())
        return hashed.digest(), keys[index]

    return tuple(sorted(range(len(keys)), key=weight, reverse=True))


def rank_replicas(
    replicas: Sequence[ReplicaState],
    homes: Sequence[int],
    policy: PlacementPolicy,
    in_flight: int = 0,
    turn: int = 0,
) -> list[Choice]:
    """All replicas, best first. Empty only when ``replicas`` is empty.

    homes: the adapter's ``rendezvous_order`` over the same replicas; empty for the base model, which goes by
    load alone. in_flight: requests of this adapter under way. turn: any counter; it breaks ties between
    equally loaded replicas for the base model.

    Replicas that can serve come first: resident copies, then host-cached ones, then the home, then the least
    loaded. Saturated replicas follow in the same order, draining ones come last.
    """
    ready: list[int] = []
    saturated: list[int] = []
    draining: list[int] = []
    for index, replica in enumerate(replicas):
        (draining if replica.draining else saturated if replica.saturated else ready).append(index)
    ranked: list[Choice] = []
    for group in (ready, saturated, draining):
        if not group:
            continue
        if homes:
            ranked += _rank_for_adapter(replicas, group, homes, policy, in_flight)
        else:
            count = len(replicas)
            group.sort(key=lambda i: (replicas[i].load, (i + turn) % count))
            ranked += [Choice(index, Reason.LEAST_LOADED) for index in group]
    return ranked


def _rank_for_adapter(
    replicas: Sequence[ReplicaState],
    group: Sequence[int],
    homes: Sequence[int],
    policy: PlacementPolicy,
    in_flight: int,
) -> list[Choice]:
    members = set(group)
    order = [index for index in homes if index in members]
    copies = max(1, min(ceil(in_flight / _SPREAD_LOAD), 8, len(order)))
    warm = [index for index in order if replicas[index].resident]
    cold = [index for index in order if not replicas[index].resident]

    # A hot adapter uses its first `copies` warm replicas by load. A copy beyond those gets nothing while
    # they can serve, so it ages out of its replica's slots: this is how an adapter that cooled down shrinks.
    active = sorted(warm[:copies], key=lambda i: replicas[i].load)
    ranked = [Choice(index, Reason.RESIDENT) for index in active]
    if warm and cold and len(warm) < copies:
        # Another copy costs a load, so it must take real work: as much less load as one copy should carry.
        extra = min(cold[:copies], key=lambda i: replicas[i].load)
        if replicas[extra].load + _SPREAD_LOAD <= replicas[active[0]].load:
            ranked.insert(0, Choice(extra, Reason.SPREAD))
            cold.remove(extra)
    ranked += [Choice(i, Reason.RESIDENT) for i in sorted(warm[copies:], key=lambda i: replicas[i].load)]

    cached = [index for index in cold if replicas[index].host_cached]
    ranked += [Choice(index, Reason.HOST_CACHED) for index in cached]
    cold = [index for index in cold if not replicas[index].host_cached]
    if cold:
        mean = sum(replicas[index].load for index in order) / len(order)
        bound = 2.0 * mean + 8
        home = next((index for index in cold if replicas[index].load <= bound), cold[0])
        ranked.append(Choice(home, Reason.HOME))
        # Stable sort: equally loaded replicas stay in rendezvous order, the same in every router.
        rest = sorted((index for index in cold if index != home), key=lambda i: replicas[i].load)
        ranked += [Choice(index, Reason.LEAST_LOADED) for index in rest]
    return ranked

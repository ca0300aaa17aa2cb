"""Which replica should take a request: a pure function of what a router believes about the replicas.

The Serve router calls it for every request, and so does the fleet simulation. It knows neither Ray nor a clock, so the
same view and request always give the same ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from deployments.fleet_view import FleetView, Tier, stable_hash

SINGLES = 8  # at most so many replicas in a ranking: the caller tries them one by one, and then any other


class Reason(StrEnum):
    """Why a replica stands where it stands in a ranking; also the label of the decision counters."""

    RESIDENT = "resident"  # the adapter is in one of its slots
    LOADING = "loading"  # the adapter is on its way to one of its slots
    SPREAD = "spread"  # next home of an adapter whose copies are too busy
    HOST_CACHED = "host_cached"  # packed in its host memory: one copy to the device away
    HOME = "home"  # where rendezvous hashing puts an adapter that is nowhere warm
    LEAST_LOADED = "least_loaded"  # base-model requests, and whatever is left for an adapter


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """One request to be placed.

    adapter: short key of its adapter, "" for the base model. rank: of the adapter, 0 where unknown. avoid: names of
    replicas that just failed or refused it.
    """

    adapter: str = ""
    rank: int = 0
    prompt_tokens: int = 0
    tenant: str = ""
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """One place in a ranking."""

    replica: str
    reason: Reason


Indices = npt.NDArray[np.intp]


def rendezvous_weights(adapter: str, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Weight of each replica for the adapter; the heaviest is its home, the next one its second.

    Every process computes the same, and a replica that comes or goes moves only the adapters that it takes over or
    leaves behind. Highest random weight: Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
    1998; the mixing is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mixed = hashes ^ np.uint64(stable_hash(adapter))
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def place(view: FleetView, request: PlacementRequest, now: float) -> list[Choice]:
    """The replicas to try one after the other, best first: at most ``SINGLES``, at least one where there is one.

    No replica is named that is saturated, draining or to be avoided while there is one that is not.
    """
    if not view.names:
        return []
    state = view.closed
    if request.avoid:
        state = state.copy()
        avoided = view.indices(request.avoid)
        state[avoided] = np.maximum(state[avoided], 1)
    open_ = state == state.min()
    ranking = _Ranking(view)
    if request.adapter:
        _rank_for_adapter(ranking, view, request, open_, now)
    ranking.add(_cheapest(view, open_), Reason.LEAST_LOADED)
    return ranking.choices


class _Ranking:
    """Choices in the making: a replica stands where it was first added, and no more than ``SINGLES`` stand there."""

    def __init__(self, view: FleetView) -> None:
        self._names = view.names
        self._seen: set[int] = set()
        self.choices: list[Choice] = []

    def add(self, indices: Indices, reason: Reason) -> None:
        for index in indices.tolist():
            if len(self.choices) == SINGLES:
                return
            if index not in self._seen:
                self._seen.add(index)
                self.choices.append(Choice(self._names[index], reason))


def _rank_for_adapter(
    ranking: _Ranking, view: FleetView, request: PlacementRequest, open_: npt.NDArray[np.bool_], now: float
) -> None:
    holders = {tier: _those(open_, indices) for tier, indices in view.holders(request.adapter, now).items()}
    resident, loading = (_by_load(view, holders[tier]) for tier in (Tier.RESIDENT, Tier.LOADING))
    copies = view.copies(request.adapter)
    weights = rendezvous_weights(request.adapter, view.hashes)
    spare = resident[:0]
    if len(resident) > copies:
        # The copies beyond those wanted get nothing while the others can serve, and so age out of their slots: this
        # is how an adapter that cooled down shrinks. Every router keeps the same ones.
        kept = np.isin(resident, resident[np.argsort(weights[resident])[-copies:]])
        resident, spare = resident[kept], resident[~kept]
    warm = np.concatenate([resident, loading])
    best = view.loads[warm].min(initial=np.inf)
    room = open_ & (view.loads <= _bound(view, open_))
    if warm.size and (len(warm) < copies or best > view.policy.spill_at):
        # Another copy costs a load, so it must be on a replica that is less busy than those that have one.
        free = room & (view.loads < best)
        free[warm] = False
        extra = _home(view, weights, free, request.rank)
        extra = spare[:1] if spare.size and view.loads[spare[0]] < best else extra
        ranking.add(extra, Reason.RESIDENT if np.isin(extra, spare).all() else Reason.SPREAD)
    ranking.add(resident, Reason.RESIDENT)
    ranking.add(loading, Reason.LOADING)
    ranking.add(spare, Reason.RESIDENT)
    cached = holders[Tier.HOST]
    cached = cached[np.argsort(weights[cached])[::-1]]
    ranking.add(cached[room[cached]], Reason.HOST_CACHED)
    home = _home(view, weights, room, request.rank)
    ranking.add(home if home.size else _home(view, weights, open_, request.rank), Reason.HOME)
    ranking.add(cached, Reason.HOST_CACHED)


def _home(view: FleetView, weights: npt.NDArray[np.uint64], allowed: npt.NDArray[np.bool_], rank: int) -> Indices:
    """The heaviest of those allowed, one that has a slot for the rank if there is one; empty if none is allowed."""
    fitting = allowed & (view.room >= max(rank, 1))
    if not fitting.any():
        fitting = allowed
    candidates = np.flatnonzero(fitting)
    return candidates[np.argsort(weights[candidates])[-1:]]


def _bound(view: FleetView, open_: npt.NDArray[np.bool_]) -> float:
    policy = view.policy
    return policy.home_load_factor * float(view.loads[open_].mean()) + policy.home_load_slack


def _cheapest(view: FleetView, open_: npt.NDArray[np.bool_]) -> Indices:
    """The least loaded, equally loaded ones in turns."""
    candidates = np.flatnonzero(open_)
    loads = np.roll(view.loads[candidates], -view.turn)
    first = np.arange(loads.size) if loads.size <= SINGLES else np.argpartition(loads, SINGLES)[:SINGLES]
    order = first[np.lexsort((first, loads[first]))]
    return candidates[(order + view.turn) % candidates.size]


def _by_load(view: FleetView, indices: Indices) -> Indices:
    return indices[np.argsort(view.loads[indices], kind="stable")]


def _those(open_: npt.NDArray[np.bool_], indices: list[int]) -> Indices:
    found = np.array(indices, np.intp)
    return found[open_[found]]

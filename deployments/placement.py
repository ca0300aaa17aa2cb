"""Which replica should take a request: a pure function of what a router believes about the replicas.

The Serve router calls it for every request, and so does the fleet simulation. It knows neither Ray nor a clock, so the
same view and request always give the same ranking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.routing.fleet_view import FleetView, Tier, stable_hash

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

    adapter: short key of its adapter, "" for the base model. avoid: names of replicas that just failed or refused it.
    What it does not say, as no rule has a use for it: the adapter's rank, which only replicas that loaded it know; the
    prompt's length, which every replica has to compute alike; the tenant, whose share is the scheduler's business.
    """

    adapter: str = ""
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """One place in a ranking."""

    replica: str
    reason: Reason


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
    able = state == state.min()
    ranking = _Ranking(view.names)
    if request.adapter:
        _rank_for_adapter(ranking, view, request, able, now)
        ranking.add(_cheapest(view, able, 1), Reason.LEAST_LOADED)
    else:
        ranking.add(_cheapest(view, able, SINGLES), Reason.LEAST_LOADED)
    return ranking.choices


class _Ranking:
    """Choices in the making: a replica stands where it was first added, and no more than ``SINGLES`` stand there."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._seen: set[int] = set()
        self.choices: list[Choice] = []

    def add(self, indices: Iterable[int], reason: Reason) -> None:
        for index in indices:
            if len(self.choices) == SINGLES:
                return
            if index not in self._seen:
                self._seen.add(index)
                self.choices.append(Choice(self._names[index], reason))


def _rank_for_adapter(
    ranking: _Ranking, view: FleetView, request: PlacementRequest, able: npt.NDArray[np.bool_], now: float
) -> None:
    policy, loads = view.policy, view.loads
    holders = {
        tier: [index for index in indices if able[index]]
        for tier, indices in view.holders(request.adapter, now).items()
    }
    resident, loading, cached = holders[Tier.RESIDENT], holders[Tier.LOADING], holders[Tier.HOST]
    weights = rendezvous_weights(request.adapter, view.hashes)
    copies = view.copies(request.adapter)
    spare: list[int] = []
    if len(resident) > copies:
        # The copies beyond those wanted get nothing while the others can serve, and so age out of their slots: this
        # is how an adapter that cooled down shrinks. Every router keeps the same ones.
        by_weight = _sorted(resident, weights)[::-1]
        resident, spare = by_weight[:copies], by_weight[copies:]
    resident = _sorted(resident, view.costs)
    loading = _sorted(loading, view.costs)
    cached = _sorted(cached, weights)[::-1]
    bound = policy.home_load_factor * float(loads[able].mean()) + policy.home_load_slack
    roomy = able & (loads <= bound)
    warm = [*resident, *loading]
    best = min((loads[index] for index in warm), default=np.inf)
    if warm and (len(warm) < view.wanted(request.adapter) or best > policy.spill_at):
        # Another copy costs a load, so it must be for rows that are there now, where the request runs sooner, and where
        # it would not itself wait: else, with every replica busy, copies would be made all the time and nobody served.
        sooner = min(best, policy.spill_at)
        ranking.add([index for index in spare if loads[index] < sooner][:1], Reason.RESIDENT)
        if not ranking.choices:
            elsewhere = roomy & (loads < sooner)
            elsewhere[warm] = False
            at_hand = [index for index in cached if elsewhere[index]]
            ranking.add(at_hand[:1] or _home(view, weights, elsewhere), Reason.SPREAD)
    ranking.add(resident, Reason.RESIDENT)
    ranking.add(loading, Reason.LOADING)
    ranking.add(spare, Reason.RESIDENT)
    at_once = max(bound, policy.spill_at)
    ranking.add([index for index in cached if loads[index] <= at_once], Reason.HOST_CACHED)
    ranking.add(_home(view, weights, roomy) or _home(view, weights, able), Reason.HOME)
    ranking.add(cached, Reason.HOST_CACHED)


def _home(view: FleetView, weights: npt.NDArray[np.uint64], allowed: npt.NDArray[np.bool_]) -> list[int]:
    """The heaviest of those allowed, one that has a slot to give if there is one; nobody if none is allowed."""
    for fitting in (allowed & view.room, allowed):
        heaviest = int(np.where(fitting, weights, 0).argmax())
        if fitting[heaviest]:
            return [heaviest]
    return []


def _cheapest(view: FleetView, able: npt.NDArray[np.bool_], count: int) -> list[int]:
    """The least costly, equally costly ones in turns."""
    total = len(view.names)
    turn = view.turn % total
    costs = np.where(able, view.costs, np.inf)
    costs = np.concatenate([costs[turn:], costs[:turn]])
    found = [int(costs.argmin())] if count == 1 else _least(costs, count)
    return [(index + turn) % total for index in found if costs[index] < np.inf]


def _least(costs: npt.NDArray[np.float64], count: int) -> list[int]:
    some = (
        np.flatnonzero(costs <= np.partition(costs, count - 1)[count - 1])
        if costs.size > count
        else np.arange(costs.size)
    )
    return some[np.argsort(costs[some], kind="stable")][:count].tolist()


def _sorted(indices: list[int], by: npt.NDArray[Any]) -> list[int]:
    if len(indices) < 2:
        return indices
    if len(indices) < 16:
        return sorted(indices, key=by.__getitem__)
    found = np.array(indices)
    return found[np.argsort(by[found], kind="stable")].tolist()

"""Hit rates that no router can know how to reach: they are told what will come."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt


def best_placement(adapters: npt.NDArray[np.int64], slots: int) -> float:
    """Share of the requests that hit when the fleet's slots hold, all the time, the adapters asked for most in them.

    The best placement that stays as it is, for these very requests: told in advance what they are, one copy of each,
    loaded before the first request, on replicas that never fill up.
    """
    counts = np.sort(np.unique(adapters, return_counts=True)[1])[::-1]
    return float(counts[:slots].sum() / max(len(adapters), 1))


def clairvoyant(adapters: npt.NDArray[np.int64], slots: int, measured_from: int) -> float:
    """Share of the requests from ``measured_from`` on that hit in one cache of all the fleet's slots which always gives
    up what is asked for again last (Belady's MIN), empty at first: no fleet of as many slots that serves each request
    from a slot has fewer misses over all of the requests.
    """
    count = len(adapters)
    following = np.full(count, count, np.int64)
    order = np.lexsort((np.arange(count), adapters))
    same = adapters[order][1:] == adapters[order][:-1]
    following[order[:-1][same]] = order[1:][same]
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for number, (adapter, again) in enumerate(zip(adapters.tolist(), following.tolist(), strict=True)):
        if adapter in held:
            hits += number >= measured_from
        elif len(held) >= slots:
            while True:
                negative, victim = heapq.heappop(farthest)
                if held.get(victim) == -negative:
                    del held[victim]
                    break
        held[adapter] = again
        heapq.heappush(farthest, (-again, adapter))
    return hits / max(count - measured_from, 1)

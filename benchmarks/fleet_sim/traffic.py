"""The requests of a simulation: which adapter, when, how many tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival. ``times`` in seconds, ``tokens`` of the answers."""

    times: npt.NDArray[np.float64]
    adapters: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def gamma_traffic(
    adapters: int, zipf: float, rate: float, seconds: float, shape: float, mean_tokens: float, seed: int
) -> Traffic:
    """Each adapter's requests come by a Gamma renewal process of its own; rates by Zipf's law add up to ``rate``.

    shape: of the times between requests of one adapter; 1 is Poisson, below 1 they come in bursts (squared coefficient
    of variation 1 / shape). The processes are in equilibrium at time 0; numbers of tokens are exponential.
    """
    rng = np.random.default_rng(seed)
    shares = np.arange(1, adapters + 1, dtype=np.float64) ** -zipf
    rates = rate * shares / shares.sum()
    # Time to the first request after a random moment: a uniform part of a length-biased interval.
    nexts = rng.random(adapters) * rng.gamma(shape + 1, 1 / (shape * rates))
    alive = np.flatnonzero(nexts < seconds)
    times, names = [], []
    while alive.size:
        times.append(nexts[alive])
        names.append(alive)
        nexts[alive] += rng.gamma(shape, 1 / (shape * rates[alive]))
        alive = alive[nexts[alive] < seconds]
    when = np.concatenate([*times, np.empty(0)])
    order = np.argsort(when, kind="stable")
    count = len(order)
    tokens = np.clip(np.ceil(rng.exponential(mean_tokens, count)), 1, MAX_TOKENS).astype(np.int64)
    # Names are shuffled: nothing may follow from an adapter's number.
    label = rng.permutation(adapters)
    return Traffic(when[order], label[np.concatenate([*names, np.empty(0, np.int64)])[order]], tokens)

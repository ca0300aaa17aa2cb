"""Which adapters are asked for most: counted at each replica, added up at the hub. Pure state, no Ray, no clock."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

HALF_LIFE_SECONDS = 300.0
MOST_COUNTED = 20_000  # adapters of one replica
FORGET_AFTER_SECONDS = 24 * 3600.0
FRESH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class HotAdapter:
    """One adapter's share of the demand.

    reference: where its source has it, as text. digest: its content. rank: 0 where unknown. heat: requests, each of
    them counting half as much every ``HALF_LIFE_SECONDS``.
    """

    reference: str
    digest: str
    rank: int
    heat: float


class HeatMeter:
    """Counts one replica's requests."""

    def __init__(self) -> None:
        self._heats: dict[str, tuple[str, float]] = {}  # digest -> reference, heat as of the epoch below
        self._epoch = 0.0

    def asked(self, reference: str, digest: str, now: float) -> None:
        """A request for the adapter came."""
        _, heat = self._heats.get(digest, (reference, 0.0))
        self._heats[digest] = reference, heat + 1 / self._decay(now)  # later ones weigh more: none needs to be touched
        if len(self._heats) > 2 * MOST_COUNTED or now - self._epoch > 50 * HALF_LIFE_SECONDS:
            self._settle(now)

    def hottest(self, limit: int, ranks: dict[str, int], now: float) -> tuple[HotAdapter, ...]:
        """The adapters asked for most, hottest first. ranks: digest -> rank of those where it is known."""
        decay = self._decay(now)
        most = heapq.nlargest(limit, self._heats.items(), key=lambda entry: (entry[1][1], entry[0]))
        return tuple(
            HotAdapter(reference, digest, ranks.get(digest, 0), heat * decay) for digest, (reference, heat) in most
        )

    def _decay(self, now: float) -> float:
        return _decay(now - self._epoch)

    def _settle(self, now: float) -> None:
        """Count from now on, and only what is hot: the numbers stay small, and so does the table."""
        decay = self._decay(now)
        most = heapq.nlargest(MOST_COUNTED, self._heats.items(), key=lambda entry: entry[1][1])
        self._heats = {digest: (reference, heat * decay) for digest, (reference, heat) in most}
        self._epoch = now


class HeatTable:
    """What every replica counted last. One that is gone goes on cooling down: who comes in its place asks for it."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, tuple[HotAdapter, ...]]] = {}
        self._sum: tuple[float, list[HotAdapter]] | None = None

    def tell(self, replica: str, hottest: Sequence[HotAdapter], now: float) -> None:
        """A replica's word; it replaces the one before."""
        told = self._told | {replica: (now, tuple(hottest))}
        self._told = {name: word for name, word in told.items() if now - word[0] < FORGET_AFTER_SECONDS}

    def hottest(self, limit: int, now: float) -> list[HotAdapter]:
        """Over all replicas, hottest first. No fresher than ``FRESH_SECONDS``: many replicas may start at once."""
        if self._sum is None or not 0 <= now - self._sum[0] < FRESH_SECONDS:
            cooled = (
                replace(one, heat=one.heat * _decay(now - at)) for at, told in self._told.values() for one in told
            )
            self._sum = now, added_up(cooled)
        return self._sum[1][:limit]


def added_up(adapters: Iterable[HotAdapter]) -> list[HotAdapter]:
    """Each adapter once, with the heat of all its entries, hottest first."""
    found: dict[str, HotAdapter] = {}
    for one in adapters:
        known = found.get(one.digest)
        if known is not None:
            one = replace(one, heat=one.heat + known.heat, rank=one.rank or known.rank)  # noqa: PLW2901
        found[one.digest] = one
    return sorted(found.values(), key=lambda one: (-one.heat, one.digest))


def packed(adapters: Sequence[HotAdapter], wall_time: float) -> bytes:
    """As bytes that outlast the process, with the time of day."""
    entries = [(one.reference, one.digest, one.rank, one.heat) for one in adapters]
    return json.dumps({"at": wall_time, "adapters": entries}).encode()


def unpacked(data: bytes, wall_time: float) -> list[HotAdapter]:
    """What ``packed`` made, cooled down since; nothing of what is too old."""
    kept = json.loads(data)
    age = max(wall_time - kept["at"], 0.0)
    if age >= FORGET_AFTER_SECONDS:
        return []
    adapters = (HotAdapter(*entry) for entry in kept["adapters"])
    return [replace(one, heat=one.heat * _decay(age)) for one in adapters]


def _decay(age_s: float) -> float:
    """What a request of so long ago counts."""
    return 0.5 ** (age_s / HALF_LIFE_SECONDS)

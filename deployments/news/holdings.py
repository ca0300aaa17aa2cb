"""What a replica has of which adapter, and what of that it has told."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from deployments.news.message import Changes
from deployments.routing.fleet_view import Tier

MOST_KEYS = 10_000


class Holdings:
    """Adapters by short key, each in the best tier that it has here. One thread.

    Routers are told of ``limit`` adapters at most: those in slots and on their way there first, then those in host
    memory that were brought there or asked for last. Of the rest no router knows until one is asked for again, so
    that its request may go to another replica; one that comes here finds the adapter all the same.
    """

    def __init__(self, limit: int = MOST_KEYS) -> None:
        self._limit = limit
        self._slots: frozenset[str] = frozenset()
        self._asked: dict[str, int] = {}
        self._host: set[str] = set()
        self._told: OrderedDict[str, Tier] = OrderedDict()  # what is in host memory by recency
        self._changed: dict[str, None] = {}

    def in_slots(self, keys: Iterable[str]) -> None:
        """These are all that are in slots now."""
        now = frozenset(keys)
        changed, self._slots = now ^ self._slots, now
        self._changed.update(dict.fromkeys(changed))

    def in_host(self, key: str, *, held: bool) -> None:
        """An adapter came to host memory or left it."""
        (self._host.add if held else self._host.discard)(key)
        self._changed[key] = None

    def asked(self, key: str) -> bool:
        """A request for the adapter came; until the last of them ends it is in a slot or on its way to one.

        Returns whether that is news.
        """
        self._asked[key] = self._asked.get(key, 0) + 1
        self._changed[key] = None
        return self.where(key) is not self._told.get(key)

    def left(self, key: str) -> bool:
        """A request for the adapter has ended. Returns whether that is news."""
        self._asked[key] -= 1
        if not self._asked[key]:
            del self._asked[key]
        self._changed[key] = None
        return self.where(key) is not self._told.get(key)

    def where(self, key: str) -> Tier | None:
        """The best tier that the adapter has here."""
        if key in self._slots:
            return Tier.RESIDENT
        if key in self._asked:
            return Tier.LOADING
        return Tier.HOST if key in self._host else None

    @property
    def rows(self) -> dict[str, int]:
        """Requests of each adapter."""
        return dict(self._asked)

    def changes(self) -> Changes:
        """What to tell since this was last called. Costs as much as has changed."""
        before: dict[str, Tier | None] = {}
        for key in self._changed:
            before[key] = self._told.get(key)
            tier = self.where(key)
            if tier is None:
                self._told.pop(key, None)
            else:
                self._told[key] = tier
                self._told.move_to_end(key)
        self._changed.clear()
        self._forget_oldest(before)
        added: dict[Tier, set[str]] = {tier: set() for tier in Tier}
        removed: dict[Tier, set[str]] = {tier: set() for tier in Tier}
        for key, tier in before.items():
            now = self._told.get(key)
            if now is not tier:
                if tier is not None:
                    removed[tier].add(key)
                if now is not None:
                    added[now].add(key)
        return _frozen(added, removed)

    def everything(self) -> Changes:
        """All that was told so far."""
        added: dict[Tier, set[str]] = {tier: set() for tier in Tier}
        for key, tier in self._told.items():
            added[tier].add(key)
        return _frozen(added, {})

    def _forget_oldest(self, before: dict[str, Tier | None]) -> None:
        """Keep to the limit: the adapters in host memory go first."""
        excess = len(self._told) - self._limit
        if excess <= 0:
            return
        oldest = list(islice((key for key, tier in self._told.items() if tier is Tier.HOST), excess))
        oldest += islice((key for key, tier in self._told.items() if tier is not Tier.HOST), excess - len(oldest))
        for key in oldest:
            before.setdefault(key, self._told[key])
            del self._told[key]


def _frozen(added: dict[Tier, set[str]], removed: dict[Tier, set[str]]) -> Changes:
    return Changes(
        {tier: frozenset(keys) for tier, keys in added.items()},
        {tier: frozenset(keys) for tier, keys in removed.items()},
    )

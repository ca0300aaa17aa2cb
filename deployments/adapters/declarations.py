"""What was said about adapters while the application runs: declared, pinned, told to look again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from adapter_store.references import parse_reference
from adapter_store.source import AdapterRef

FORGET_AFTER_NS = 3600 * 10**9  # what says nothing any more is kept this long, so that no old news brings it back


@dataclass(frozen=True, slots=True)
class Declaration:
    """The latest word on one name. Of two, the one with the larger stamp holds.

    stamp: nanoseconds since 1970, made unique and growing by the hub; 0 is what was never said. reference: what the
    name stands for, None where the settings or a folder say so, or nobody. pinned: keep it in a slot of every replica.
    refreshes: how often a look at the source was asked for.
    """

    name: str
    stamp: int = 0
    reference: str | None = None
    pinned: bool = False
    refreshes: int = 0

    @property
    def empty(self) -> bool:
        """Whether it only says that there is nothing to say any more."""
        return self.reference is None and not self.pinned


@dataclass(slots=True)
class Declarations:
    """All that is known, by name."""

    by_name: dict[str, Declaration] = field(default_factory=dict)

    def get(self, name: str) -> Declaration:
        """The latest word on the name; an empty one with stamp 0 when there is none."""
        return self.by_name.get(name) or Declaration(name)

    def merge(self, news: Iterable[Declaration]) -> list[Declaration]:
        """Take in what is newer; returns that."""
        fresh = [one for one in news if one.stamp > self.get(one.name).stamp]
        self.by_name.update((one.name, one) for one in fresh)
        return fresh

    def forget_old(self, now_ns: int) -> list[str]:
        """Drop what says nothing and is old; returns the names."""
        gone = [one.name for one in self.by_name.values() if one.empty and one.stamp < now_ns - FORGET_AFTER_NS]
        for name in gone:
            del self.by_name[name]
        return gone

    def references(self) -> Mapping[str, AdapterRef]:
        """Name -> reference of those declared at run time."""
        return {one.name: parse_reference(one.reference) for one in self.by_name.values() if one.reference is not None}

    def pinned(self) -> list[str]:
        """Names to keep in slots, in the order in which they were pinned."""
        return [one.name for one in sorted(self.by_name.values(), key=lambda one: one.stamp) if one.pinned]

    def highest_stamp(self) -> int:
        return max((one.stamp for one in self.by_name.values()), default=0)


def stamped(wanted: Declaration, now_ns: int, known: Declarations) -> Declaration:
    """``wanted`` with a stamp above every one that is known."""
    return replace(wanted, stamp=max(now_ns, known.highest_stamp() + 1))

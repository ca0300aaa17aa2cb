"""What a replica tells routers, as bytes: a few for each change, whatever the number of adapters.

A replica numbers its news. Each holds what changed since the one before; now and then one holds everything, and whoever
missed one needs the latest of those and all that came after it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deployments.routing.fleet_view import ReplicaLoad, Tier
from deployments.routing.short_key import KEY_LENGTH

TIERS = tuple(Tier)
_KEY_BYTES = KEY_LENGTH // 2
_KEYS = struct.Struct("<6I")  # of each tier: how many came, how many left
_LOAD = struct.Struct("<4I2?2H")  # running, waiting, max_rows, ranks, saturated, draining, classes, adapters
_SLOTS = struct.Struct("<2I")


@dataclass(frozen=True, slots=True)
class Changes:
    """Short keys that came to a tier or left it, since the news before; or all that there are, and nothing left."""

    added: Mapping[Tier, frozenset[str]]
    removed: Mapping[Tier, frozenset[str]]

    def __bool__(self) -> bool:
        return any(self.added.values()) or any(self.removed.values())


@dataclass(frozen=True, slots=True)
class ReplicaNews:
    """One message. It is opaque to the hub, which keeps and passes on what it was given.

    sequence: grows by one with every message of a replica that has ``keys``, and stays for others. whole: ``keys`` are
    all there are. keys: ``pack_keys``, None where nothing changed. load: ``pack_load``, None where it did not change.
    since: when the oldest of the changes came about, in seconds of the replica's wall clock. urgent: whoever waits for
    news is to have it at once; else with the next answer.
    """

    replica: str
    sequence: int
    whole: bool = False
    keys: bytes | None = None
    load: bytes | None = None
    since: float = 0.0
    urgent: bool = True

    @property
    def nbytes(self) -> int:
        return len(self.keys or b"") + len(self.load or b"")


def pack_keys(changes: Changes) -> bytes:
    """24 bytes and 8 for each key."""
    groups = [group.get(tier, frozenset()) for tier in TIERS for group in (changes.added, changes.removed)]
    return _KEYS.pack(*map(len, groups)) + b"".join(map(_pack, groups))


def unpack_keys(data: bytes) -> Changes:
    """The opposite of ``pack_keys``."""
    groups, at = [], _KEYS.size
    for count in _KEYS.unpack_from(data):
        end = at + count * _KEY_BYTES
        groups.append(frozenset(_unpack(data[at:end])))
        at = end
    return Changes(dict(zip(TIERS, groups[::2], strict=True)), dict(zip(TIERS, groups[1::2], strict=True)))


def pack_load(load: ReplicaLoad) -> bytes:
    """22 bytes, 8 for each class of slots and 12 for each adapter that has rows."""
    return b"".join(
        (
            _LOAD.pack(
                load.running,
                load.waiting,
                load.max_rows,
                load.ranks,
                load.saturated,
                load.draining,
                len(load.free_slots),
                len(load.rows),
            ),
            *(_SLOTS.pack(*slots) for slots in load.free_slots),
            _pack(load.rows),
            struct.pack(f"<{len(load.rows)}I", *load.rows.values()),
        )
    )


def unpack_load(data: bytes) -> ReplicaLoad:
    """The opposite of ``pack_load``."""
    running, waiting, max_rows, ranks, saturated, draining, classes, adapters = _LOAD.unpack_from(data)
    slots_end = _LOAD.size + classes * _SLOTS.size
    keys_end = slots_end + adapters * _KEY_BYTES
    free = tuple(_SLOTS.iter_unpack(data[_LOAD.size : slots_end]))
    counts = struct.unpack_from(f"<{adapters}I", data, keys_end)
    rows = dict(zip(_unpack(data[slots_end:keys_end]), counts, strict=True))
    return ReplicaLoad(running, waiting, max_rows, ranks, free, saturated, draining, rows)


def _pack(keys: Iterable[str]) -> bytes:
    return bytes.fromhex("".join(keys))


def _unpack(data: bytes) -> list[str]:
    text = data.hex()
    return [text[at : at + KEY_LENGTH] for at in range(0, len(text), KEY_LENGTH)]

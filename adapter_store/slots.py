"""Adapter slots in the memory that the kernels read: one arena, fixed rank classes, reference counts, eviction."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_store.errors import PinRefused
from adapter_store.eviction import EvictionPolicy, LeastRecentlyUsed
from adapter_store.layout import AdapterLayout
from adapter_store.packed import PackedAdapter
from adapter_store.slot_copies import SlotCopies
from adapter_store.slot_views import SlotPicture, SlotStats
from kernels.lora_group import packed_rank

SLOT_ALIGNMENT = 128  # elements; keeps every slot start aligned for 16-byte (and wider) loads


@dataclass(slots=True, eq=False)
class Slot:
    """One adapter's place. The pool changes it; others only read ``index``, ``digest`` and ``rank``.

    index: row of the slot table, what the kernels take as the adapter's index. offset: first element in the arena.
    class_rank: the largest rank that fits. rank: the adapter's rank. refs: requests that use it now.
    pinned: never given to another adapter. name: what the adapter was first asked for as. used_at: when a request last
    took or gave back a reference, ``time.monotonic()`` seconds.
    """

    index: int
    class_rank: int
    offset: int
    capacity: int
    digest: str | None = None
    rank: int = 0
    refs: int = 0
    loaded: bool = False
    pinned: bool = False
    name: str = ""
    used_at: float = 0.0
    _copied: torch.cuda.Event | None = field(default=None, repr=False)
    _last_read: torch.cuda.Event | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Residency:
    """A moment's picture of the pool that any thread may keep. ``version`` grows with every change.

    adapters: digest -> rank of what is in a slot. capacity: rank class -> slots. free: rank class -> empty slots.
    """

    version: int
    adapters: Mapping[str, int]
    capacity: Mapping[int, int]
    free: Mapping[int, int]


class SlotPool:
    """The slots of one replica.

    Owned by the thread that launches the steps: every method is called from it, except ``residency`` and ``stats``,
    which any thread may call. Choice of a slot for an adapter that is not resident, best first: an empty slot of the
    smallest class that fits; an empty slot of a larger class; of those without references and pins that nobody in the
    queue asks for (``want``), of the smallest class that fits, the one that the policy values least; of those that
    somebody does ask for, the one whose turn comes last.

    Order of memory operations on CUDA. Copies run on a stream of the pool's own. ``step_done`` records an event behind
    each step, ``release`` keeps the latest one with the slot, and whatever is next written there waits for it: call
    ``step_done`` after the launch of a step and before the release of a slot that this step reads. A step that reads
    a slot may be launched once ``ready(slot)`` is true, or behind ``wait(slot)``. On the CPU all of this is in program
    order.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        classes: Mapping[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        eviction: EvictionPolicy | None = None,
        poison: bool = False,
        on_change: Callable[[Residency], None] | None = None,
    ) -> None:
        """Allocate the arena.

        classes: rank -> number of slots. eviction: least recently used first, unless another policy is given.
        poison: fill memory that holds no adapter with NaN (tests).
        on_change: called with the new residency, on the owner's thread, after each load and eviction.
        Raises ValueError when ``classes`` is empty or holds a rank or count below 1.
        """
        if not classes or any(rank < 1 or count < 1 for rank, count in classes.items()):
            raise ValueError(f"slots is {dict(classes)!r} but must map ranks of 1 or more to counts of 1 or more")
        self.layout = layout
        self.device = torch.device(device)
        self.max_rank = max(classes)
        self._classes = dict(sorted(classes.items()))
        self._poison = poison
        self._on_change = on_change
        self._slots: list[Slot] = []
        offset = 0
        for rank, count in self._classes.items():
            capacity = math.ceil(layout.slab_elements(rank) / SLOT_ALIGNMENT) * SLOT_ALIGNMENT
            for _ in range(count):
                self._slots.append(Slot(len(self._slots), rank, offset, capacity))
                offset += capacity
        fill = math.nan if poison else 0.0
        #: (elements,) what the kernels read weights from.
        self.arena: Tensor = torch.full((offset,), fill, dtype=dtype, device=self.device)
        #: (slots, 2) int64: element offset and packed rank; rank 0 where no adapter is.
        self.slot_table: Tensor = torch.zeros((len(self._slots), 2), dtype=torch.int64, device=self.device)
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        # One row per slot, so that no row is rewritten while another slot's copy still reads it.
        self._host_rows = torch.zeros((len(self._slots), 2), dtype=torch.int64, pin_memory=self._cuda)
        self._zero_row = torch.zeros(2, dtype=torch.int64, pin_memory=self._cuda)
        self._last_step: torch.cuda.Event | None = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._eviction = eviction or LeastRecentlyUsed()
        self._resident: dict[str, Slot] = {}
        self._wanted: dict[str, int] = {}  # digest -> how soon its turn comes
        self._copies = SlotCopies(self._stream)
        self._free: dict[int, list[Slot]] = {rank: [] for rank in self._classes}
        for slot in reversed(self._slots):
            self._free[slot.class_rank].append(slot)
        self._hits = self._misses = self._evictions = self._exhausted = 0
        self._residency = Residency(0, {}, dict(self._classes), dict(self._classes))
        #: Grows whenever there may be a slot to give that was not there before, or an adapter less.
        self.changes = 0

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, digest: str) -> Slot | None:
        """The slot that holds this content (loaded or on its way), without taking a reference."""
        return self._resident.get(digest)

    def want(self, digests: Iterable[str]) -> None:
        """Say what the queue asks for, soonest first. It is evicted after everything else, and the last of it first."""
        self._wanted = {}
        for digest in digests:
            self._wanted.setdefault(digest, len(self._wanted))

    def acquire(self, digest: str, rank: int | None = None, *, spare: bool = False) -> Slot | None:
        """Take a reference to the slot of ``digest``, assigning one when it has none.

        With ``rank`` None only an adapter that already has a slot is found. spare: assign only a slot that is empty or
        holds what nobody asks for. None is returned when there is no slot to give. When ``slot.loaded`` is false the
        caller must ``load`` it, or ``release`` it again.
        Raises ValueError when no class is as large as ``rank``.
        """
        if rank is not None and not 1 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} fits no slot class; the classes are {list(self._classes)}")
        slot = self._resident.get(digest)
        if slot is None:
            return None if rank is None else self._assign(digest, rank, spare)
        slot.refs += 1
        slot.used_at = time.monotonic()
        self._hits += 1
        if slot.loaded:
            self._eviction.used(digest)
        return slot

    def load(self, slot: Slot, packed: PackedAdapter, done: Callable[[], None] | None = None) -> None:
        """Copy the adapter into its slot: one copy, behind the last step that read what was there before.

        The slot table's row follows the copy on the same stream. Does not block on CUDA.
        done: called on the owner's thread when the slab has been read, by ``settle`` or, on the CPU, at once.
        """
        assert slot.digest == packed.digest, "the slot was assigned to other content"
        assert slot.refs > 0, "a slot without references may be given away at any time"
        assert packed.slab.numel() == self.layout.slab_elements(packed.rank) <= slot.capacity
        assert packed.slab.dtype == self.arena.dtype
        target = self.arena[slot.offset : slot.offset + packed.slab.numel()]
        row = self._host_rows[slot.index]
        row[0], row[1] = slot.offset, packed_rank(packed.rank)
        writes = ((target, packed.slab), (self.slot_table[slot.index], row))
        slot._copied = self._copies.start(packed, writes, behind=slot._last_read, done=done)
        slot.rank, slot.name = packed.rank, packed.name
        slot.loaded = True
        # Alike in slots, whatever its size and source: each takes a slot of its class, and a copy brings it back.
        self._eviction.added(packed.digest, 1, 1.0)
        self._changed()

    def settle(self) -> int:
        """Call ``done`` of the copies that are through; returns how many are still under way. Never blocks."""
        return self._copies.settle()

    def ready(self, slot: Slot) -> bool:
        """Whether steps launched from now on may read the slot. Never blocks."""
        if not slot.loaded:
            return False
        if slot._copied is not None:
            if not slot._copied.query():
                return False
            slot._copied = None
        return True

    def wait(self, slot: Slot, stream: torch.cuda.Stream | None = None) -> None:
        """Make ``stream`` (default: the current one) wait for the slot's copy; the host does not wait."""
        assert slot.loaded
        if slot._copied is not None:
            (stream or torch.cuda.current_stream(self.device)).wait_event(slot._copied)

    def step_done(self, stream: torch.cuda.Stream | None = None) -> None:
        """Say that a step has been launched on ``stream`` (default: the current one). Nothing on the CPU."""
        if self._cuda:
            self._last_step = torch.cuda.Event()
            self._last_step.record(stream or torch.cuda.current_stream(self.device))

    def release(self, slot: Slot) -> None:
        """Give one reference back. The adapter stays resident until its slot is needed; a slot that was never loaded
        is empty again at once."""
        assert slot.refs > 0, "released more often than acquired"
        assert slot.digest is not None
        slot.refs -= 1
        slot.used_at = time.monotonic()
        self.changes += slot.refs == 0
        slot._last_read = self._last_step
        if slot.loaded:
            self._eviction.released(slot.digest)
        elif slot.refs == 0:
            self._vacate(slot)
            self._free[slot.class_rank].append(slot)
            self._changed()

    def pin(self, slot: Slot) -> None:
        """Never evict the slot's adapter. Raises PinRefused when that leaves no slot that every adapter can go to."""
        assert slot.digest is not None
        if slot.pinned:
            return
        left = sum(not other.pinned for other in self._slots if other.class_rank == self.max_rank)
        if slot.class_rank == self.max_rank and left == 1:
            raise PinRefused(
                slot.digest[:12],
                f"{len(self.pinned)} of {len(self)} slots are pinned, and the last of rank {self.max_rank} that is not "
                "must stay for other adapters: unpin one, or raise slots",
            )
        slot.pinned = True

    def unpin(self, digest: str) -> bool:
        """Let the adapter be evicted again; False when it was not pinned."""
        slot = self._resident.get(digest)
        if slot is None or not slot.pinned:
            return False
        slot.pinned = False
        self.changes += 1
        return True

    def remove(self, digest: str) -> bool:
        """Empty the adapter's slot, pinned or not; False when it has none or a request uses it."""
        slot = self._resident.get(digest)
        if slot is None or slot.refs:
            return False
        self._vacate(slot)
        self._free[slot.class_rank].append(slot)
        self._changed()
        return True

    def clear(self) -> None:
        """Empty every slot that no request uses, pinned or not."""
        for slot in [slot for slot in self._resident.values() if slot.refs == 0]:
            self._vacate(slot)
            self._free[slot.class_rank].append(slot)
        self._changed()

    def residency(self) -> Residency:
        """What is in the slots now. Any thread."""
        return self._residency

    def stats(self) -> SlotStats:
        """Counters so far. Any thread."""
        elements = sum(self.layout.slab_elements(rank) for rank in self._residency.adapters.values())
        return SlotStats(
            self._hits,
            self._misses,
            self._evictions,
            self._exhausted,
            self._copies.totals,
            elements * self.arena.element_size(),
            self.arena.nbytes,
        )

    def pictures(self) -> list[SlotPicture]:
        """Every slot as it is now, in the order of the slot table. Any thread."""
        now = time.monotonic()
        return [
            SlotPicture(slot.class_rank)
            if slot.digest is None
            else SlotPicture(
                slot.class_rank,
                slot.digest,
                slot.name,
                slot.rank,
                slot.refs,
                slot.loaded,
                slot.pinned,
                max(0.0, now - slot.used_at),
            )
            for slot in self._slots
        ]

    @property
    def pinned(self) -> tuple[str, ...]:
        """Digests of the pinned adapters. Any thread."""
        return tuple(slot.digest for slot in self._slots if slot.pinned and slot.digest is not None)

    @property
    def in_use(self) -> int:
        """Slots that requests hold a reference to now. Any thread."""
        return sum(slot.refs > 0 for slot in self._slots)

    def available(self) -> dict[int, int]:
        """By rank class, the slots that are empty or hold an adapter which may be evicted now. Any thread."""
        counts = dict.fromkeys(self._classes, 0)
        for slot in self._slots:
            counts[slot.class_rank] += slot.refs == 0 and not slot.pinned
        return counts

    def _assign(self, digest: str, rank: int, spare: bool) -> Slot | None:
        slot = self._empty_slot(rank) or self._evict_for(rank, spare)
        if slot is None:
            self._exhausted += 1
            return None
        self._misses += 1
        slot.digest, slot.name, slot.rank, slot.refs = digest, "", rank, 1
        slot.used_at = time.monotonic()
        self._resident[digest] = slot
        return slot

    def _empty_slot(self, rank: int) -> Slot | None:
        for class_rank, free in self._free.items():
            if class_rank >= rank and free:
                return free.pop()
        return None

    def _evict_for(self, rank: int, spare: bool) -> Slot | None:
        victims: list[tuple[int, int, float, Slot]] = []
        for digest, slot in self._resident.items():
            if slot.refs or slot.pinned or slot.class_rank < rank:
                continue
            turn = self._wanted.get(digest)
            if turn is None:
                victims.append((0, slot.class_rank, self._eviction.value(digest), slot))
            elif not spare:
                victims.append((1, -turn, 0.0, slot))
        if not victims:
            return None
        victim = min(victims, key=lambda entry: entry[:3])[3]
        self._vacate(victim, evicted=True)
        self._evictions += 1
        self._changed()
        return victim

    def _vacate(self, slot: Slot, *, evicted: bool = False) -> None:
        """Forget the adapter; its row goes to rank 0 behind the last step that read it."""
        assert slot.refs == 0 and slot.digest is not None
        del self._resident[slot.digest]
        if slot.loaded:
            self._eviction.removed(slot.digest, evicted=evicted)
        slot.digest, slot.rank, slot.loaded, slot.pinned = None, 0, False, False
        region = self.arena[slot.offset : slot.offset + slot.capacity]
        if self._stream is None:
            self.slot_table[slot.index].zero_()
            if self._poison:
                region.fill_(math.nan)
            return
        with torch.cuda.stream(self._stream):
            if slot._last_read is not None:
                self._stream.wait_event(slot._last_read)
            self.slot_table[slot.index].copy_(self._zero_row, non_blocking=True)
            if self._poison:
                region.fill_(math.nan)

    def _changed(self) -> None:
        self.changes += 1
        self._residency = Residency(
            self._residency.version + 1,
            {digest: slot.rank for digest, slot in self._resident.items() if slot.loaded},
            self._residency.capacity,
            {rank: len(free) for rank, free in self._free.items()},
        )
        if self._on_change is not None:
            self._on_change(self._residency)

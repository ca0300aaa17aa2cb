"""Which waiting sequence gets an adapter slot, at whose expense, and what is copied to slots ahead of its turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from engine.sequence import Sequence
from engine.waiting import WaitingQueue


class SlotAssignment:
    """Gives slots to sequences in the order in which they are asked about, once a step.

    A sequence refers to its adapter in host memory while it waits without a slot to rely on, and to a slot from its
    admission to its end. One that ``max_overtakes`` others have overtaken for want of a slot drains one: it picks the
    slot whose users will be done first, and nobody behind it may join that slot's adapter until it has been freed.
    """

    def __init__(
        self,
        slots: SlotPool,
        waiting: WaitingQueue,
        running: list[Sequence],
        max_overtakes: int,
        let_go: Callable[[PackedAdapter], None] | None = None,
    ) -> None:
        """running: the scheduler's list. let_go: called for each host copy that is not needed any more."""
        self._slots = slots
        self._waiting = waiting
        self._running = running
        self._max_overtakes = max_overtakes
        self._let_go = let_go or _nothing
        # Within a step no slot comes free: adapters of this rank or more that are not resident need not ask again.
        self._scarce_rank = sys.maxsize
        self._told = False  # whether the pool knows what this step's queue wants
        self._drained: set[str] = set()  # what nobody may join any more in this step
        self._seen: tuple[int, int] | None = None  # changes after which there was nothing to look ahead for
        self.prefetches = 0

    def begin_step(self) -> None:
        """Forget what was known of the last step."""
        self._scarce_rank, self._told = sys.maxsize, False
        self._drained.clear()

    def ready(self, sequence: Sequence) -> bool:
        """Whether a step may read the sequence's adapter."""
        return sequence.slot is None or self._slots.ready(sequence.slot)

    def take(self, sequence: Sequence) -> bool:
        """Whether the sequence has what its adapter needs; starts the copy when the adapter is not resident."""
        digest = sequence.digest
        if digest is None or sequence.slot is not None:
            return True
        if digest in self._drained:
            self._note(sequence)
            return False
        resident = self._slots.find(digest) is not None
        if resident:
            sequence.slot = self._slots.acquire(digest)
        elif sequence.adapter is None:
            return False  # evicted since it was queued, see lost
        elif sequence.adapter.rank < self._scarce_rank:
            self._tell()
            sequence.slot = self._slots.acquire(digest, sequence.adapter.rank)
        if sequence.slot is None:
            assert sequence.adapter is not None
            rank = sequence.adapter.rank
            self._scarce_rank = min(self._scarce_rank, rank)
            if sequence.overtaken >= self._max_overtakes and not self._fits(rank, sequence.draining):
                sequence.draining = self._soonest_free(rank)
            self._note(sequence)
            return False
        sequence.draining = None
        if not sequence.slot.loaded:
            assert sequence.adapter is not None
            self._slots.load(sequence.slot, sequence.adapter, partial(self._let_go, sequence.adapter))
            sequence.adapter = None
        self.drop_host_copy(sequence)
        return True

    def give_up(self, sequence: Sequence) -> None:
        """Free the sequence's slot reference and its host copy."""
        self.drop_host_copy(sequence)
        if sequence.slot is not None:
            self._slots.release(sequence.slot)
            sequence.slot = None

    def drop_host_copy(self, sequence: Sequence) -> None:
        """Let go of the sequence's adapter in host memory, if it has one."""
        if sequence.adapter is not None:
            packed, sequence.adapter = sequence.adapter, None
            self._let_go(packed)

    def look_ahead(self) -> tuple[Sequence, ...]:
        """After the admissions of a step: copy one adapter of the queue to a slot ahead of its turn, and take those out
        of the queue whose adapter is neither in host memory nor in a slot any more, which are returned."""
        changes = self._waiting.changes, self._slots.changes
        if changes == self._seen:
            return ()
        ahead: list[Sequence] = []
        lost: list[Sequence] = []
        unsure = False
        for sequence in self._waiting:
            if sequence.digest is None or sequence.slot is not None:
                continue
            resident = self._slots.find(sequence.digest) is not None
            if resident:
                self.drop_host_copy(sequence)  # it relies on the slot
            elif sequence.adapter is not None:
                ahead.append(sequence)
            elif sequence.awaited >= 0:
                unsure = True  # preempted in this very step, and perhaps at its end with the token that is under way
            else:
                lost.append(sequence)
        for sequence in lost:
            self._waiting.remove(sequence)
        copies = self._slots.settle() if ahead else 0
        if not copies and not unsure and not self._prefetch(ahead) and not lost:
            self._seen = changes
        return tuple(lost)

    def _prefetch(self, ahead: list[Sequence]) -> bool:
        """Copy the adapter of the first that can be to a slot that is empty or holds what nobody in the queue asks for.

        One at a time, and only while no other copy is under way: those for sequences that are admitted go first. Nobody
        refers to the slot; whoever is before its sequence in the order may still take it.
        """
        if ahead:
            self._tell()
        for sequence in sorted(ahead, key=self._waiting.order):
            packed = sequence.adapter
            assert packed is not None
            if packed.rank >= self._scarce_rank:
                continue
            if self._bring(packed, spare=True):
                sequence.adapter = None
                self.prefetches += 1
                return True
            self._scarce_rank = packed.rank
        return False

    def to_slot(self, packed: PackedAdapter, *, spare: bool = True) -> bool:
        """Between steps: bring an adapter from host memory into a slot that nobody uses, one that somebody in the queue
        asks for only if not ``spare``. True when there is one: the caller's reference to the host copy is taken over.
        """
        self._told = False
        self._tell()
        return self._bring(packed, spare=spare)

    def _bring(self, packed: PackedAdapter, *, spare: bool) -> bool:
        slot = self._slots.acquire(packed.digest, packed.rank, spare=spare)
        if slot is None:
            return False
        if slot.loaded:
            self._let_go(packed)
        else:
            self._slots.load(slot, packed, partial(self._let_go, packed))
        self._slots.release(slot)
        return True

    def _tell(self) -> None:
        if not self._told:
            self._slots.want(sequence.digest for sequence in self._waiting.ordered() if sequence.digest is not None)
            self._told = True

    def _fits(self, rank: int, digest: str | None) -> bool:
        """Whether the adapter's slot is one for ``rank``. An earlier request may have taken a slot that was drained."""
        slot = None if digest is None else self._slots.find(digest)
        return slot is not None and slot.class_rank >= rank and not slot.pinned

    def _note(self, sequence: Sequence) -> None:
        """Those behind the sequence may not join what it drains."""
        if sequence.draining is not None:
            self._drained.add(sequence.draining)

    def _soonest_free(self, rank: int) -> str | None:
        """The adapter whose last user has the fewest tokens to go, in a slot that fits; not one drained already."""
        to_go: dict[str, int] = {}
        for sequence in (*self._running, *self._waiting):
            slot = sequence.slot
            if slot is None or slot.pinned or slot.class_rank < rank:
                continue
            if slot.digest is not None and slot.digest not in self._drained:
                left = sequence.max_tokens - len(sequence.tokens)
                to_go[slot.digest] = max(to_go.get(slot.digest, 0), left)
        return min(to_go, key=to_go.__getitem__, default=None)


def _nothing(_: PackedAdapter) -> None:
    """What becomes of host copies that nobody counts."""

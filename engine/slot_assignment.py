"""Which waiting sequence gets an adapter slot, at whose expense, and what is copied to slots ahead of its turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
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
        self.prefetches = 0

    def begin_step(self) -> None:
        """Forget what was known of the last step."""
        self._scarce_rank, self._told = sys.maxsize, False

    def ready(self, sequence: Sequence) -> bool:
        """Whether a step may read the sequence's adapter."""
        return sequence.slot is None or self._slots.ready(sequence.slot)

    def take(self, sequence: Sequence, passed: Iterable[Sequence]) -> bool:
        """Whether the sequence has what its adapter needs; starts the copy when the adapter is not resident.

        passed: those before it in the order for which the answer was no, in this same step.
        """
        digest = sequence.digest
        if digest is None or sequence.slot is not None:
            return True
        if any(earlier.draining == digest for earlier in passed):
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
                sequence.draining = self._soonest_free(rank, passed)
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

    def prefetch(self) -> None:
        """Copy one adapter of the queue to a slot that is empty or holds what nobody in the queue asks for.

        None while another copy is under way: those for sequences that are admitted go first. Nobody refers to the slot;
        whoever is before its sequence in the order may still take it.
        """
        ahead: list[Sequence] = []
        for sequence in self._waiting:
            if sequence.adapter is None:
                continue
            assert sequence.digest is not None
            if self._slots.find(sequence.digest) is None:
                ahead.append(sequence)
            else:
                self.drop_host_copy(sequence)  # it relies on the slot
        if not ahead or self._slots.settle():
            return
        self._tell()
        for sequence in sorted(ahead, key=self._waiting.order):
            packed = sequence.adapter
            assert packed is not None
            if packed.rank >= self._scarce_rank:
                continue
            if self._bring(packed, spare=True):
                sequence.adapter = None
                self.prefetches += 1
                return
            self._scarce_rank = packed.rank

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

    def lost(self) -> Iterator[Sequence]:
        """Take from the queue those whose adapter is neither in host memory nor in a slot any more."""
        for sequence in self._waiting:
            if sequence.awaited >= 0:
                continue  # preempted in this very step, and perhaps at its end with the token that is under way
            if sequence.adapter is not None or sequence.slot is not None or sequence.digest is None:
                continue
            if self._slots.find(sequence.digest) is None:
                self._waiting.remove(sequence)
                yield sequence

    def _tell(self) -> None:
        if not self._told:
            self._slots.want(sequence.digest for sequence in self._waiting.ordered() if sequence.digest is not None)
            self._told = True

    def _fits(self, rank: int, digest: str | None) -> bool:
        """Whether the adapter's slot is one for ``rank``. An earlier request may have taken a slot that was drained."""
        slot = None if digest is None else self._slots.find(digest)
        return slot is not None and slot.class_rank >= rank and not slot.pinned

    def _soonest_free(self, rank: int, passed: Iterable[Sequence]) -> str | None:
        """The adapter whose last user has the fewest tokens to go, in a slot that fits; not one drained already."""
        taken = {earlier.draining for earlier in passed}
        to_go: dict[str, int] = {}
        for sequence in (*self._running, *self._waiting):
            slot = sequence.slot
            if slot is None or slot.pinned or slot.class_rank < rank:
                continue
            if slot.digest is not None and slot.digest not in taken:
                left = sequence.max_tokens - len(sequence.tokens)
                to_go[slot.digest] = max(to_go.get(slot.digest, 0), left)
        return min(to_go, key=to_go.__getitem__, default=None)


def _nothing(_: PackedAdapter) -> None:
    """What becomes of host copies that nobody counts."""

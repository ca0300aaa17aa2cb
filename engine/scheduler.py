"""What runs in the next step. Decides from sequences, pages and slots alone; knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.fairness import TokenCounters, TokenWeights
from engine.kv_pages import PagePool
from engine.prefix_keys import extend_keys
from engine.sequence import Sequence
from engine.slot_assignment import SlotAssignment
from engine.waiting import WaitingQueue

if TYPE_CHECKING:
    from adapter_store.packed import PackedAdapter
    from adapter_store.slots import SlotPool


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """Tokens ``start`` up to ``end`` of one sequence. ``samples``: they are its last, and the next is drawn."""

    sequence: Sequence
    start: int
    end: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: ``num_decode`` rows of one token each, then prefill chunks.

    held: a row, or the first that waits, was left out because its grammar's next mask was not there.
    reload: sequences that relied on a slot which another adapter took before they ran. They are not queued any more:
    bring their adapter to host memory and ``add`` them again.
    """

    rows: tuple[PlannedRow, ...]
    num_decode: int
    reload: tuple[Sequence, ...] = ()
    held: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)

    @property
    def num_lora_rows(self) -> int:
        """Decode rows up to the last that has an adapter."""
        decode = enumerate(self.rows[: self.num_decode], 1)
        return max((number for number, row in decode if row.sequence.lora_index >= 0), default=0)

    @property
    def has_lora(self) -> bool:
        """Whether any row has an adapter."""
        return any(row.sequence.lora_index >= 0 for row in self.rows)


class Scheduler:
    """Continuous batching with chunked prefill under a token, a row, a page and a slot budget.

    A step takes every decoding row, then prefill chunks of running rows, then new rows in the order of the waiting
    queue, which is fair to tenants. One that follows a grammar decodes once its last token is read: in every other
    step. A request without a slot to go to is passed over and holds up nobody; a request
    without pages holds up those behind it, so that long prompts get their turn. When pages run out, the row admitted
    last gives its pages up and is computed again later, with the tokens that it had generated.

    No request waits for ever: a tenant's first is overtaken by ``max_overtakes`` others at most before it is first of
    all (``WaitingQueue``) and, where it has no slot, before one is drained for it (``SlotAssignment``).
    """

    def __init__(
        self,
        pages: PagePool,
        slots: SlotPool | None,
        *,
        max_rows: int,
        max_batch_tokens: int,
        max_overtakes: int,
        max_mixed_tokens: int | None = None,
        prefix_cache: bool = False,
        weights: TokenWeights | None = None,
        let_go: Callable[[PackedAdapter], None] | None = None,
    ) -> None:
        """Settings as in EngineSettings. let_go: called for each adapter in host memory that a sequence does not need
        any more."""
        self.pages = pages
        self.max_rows = max_rows
        self.max_batch_tokens = max_batch_tokens
        self.max_mixed_tokens = max_batch_tokens if max_mixed_tokens is None else max_mixed_tokens
        self.prefix_cache = prefix_cache
        self.counters = TokenCounters(weights or TokenWeights())
        self.waiting = WaitingQueue(self.counters, max_overtakes)
        self.running: list[Sequence] = []  # by admission
        self.slots = slots
        self.assignment: SlotAssignment | None = None
        if slots is not None:
            self.assignment = SlotAssignment(slots, self.waiting, self.running, max_overtakes, let_go)
        self.preemptions = 0
        self.reused_tokens = 0
        # Masks are made by other threads: whether one was late is asked once a step, and remembered.
        self._held = False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose adapter, if any, is in host memory or in a slot."""
        self.waiting.add(sequence)

    def has(self, sequence: Sequence) -> bool:
        """Whether it is running or queued."""
        return sequence in self.running or sequence in self.waiting

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not; its pages, its slot reference and its host copy are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_up(sequence)

    def plan(self) -> StepPlan:
        """The next step; without rows when there is nothing to do."""
        self._held = False
        if self.assignment is not None:
            self.assignment.begin_step()
        for sequence in self.running:
            self._publish(sequence)
        # Rows without an adapter last: the LoRA kernels are launched for the others alone. Rows of one adapter side by
        # side: what one has read of its weights is in the L2 when the next wants it.
        decode = sorted(self._decode_rows(), key=lambda row: row.sequence.lora_index, reverse=True)
        prefill: list[PlannedRow] = []
        budget = self.max_batch_tokens - len(decode)
        if decode:
            budget = min(budget, self._mixed_budget(len(decode)))
        for sequence in self.running:
            if not sequence.decoding:
                budget -= self._add_chunk(prefill, sequence, budget)
        self._admit(prefill, budget)
        first = next((sequence for sequence in self.running if not sequence.decoding), None)
        if not decode and not prefill and first is not None and not self._held:
            # Every row waits for its adapter's copy: let the device wait for the first, there is nothing else to do.
            assert self.slots is not None
            assert first.slot is not None
            self.slots.wait(first.slot)
            self._add_chunk(prefill, first, budget, ready=True)
        for row in (*decode, *prefill):
            if row.samples:
                self.counters.drawn(row.sequence.tenant)
        reload: tuple[Sequence, ...] = ()
        if self.assignment is not None:
            reload = self.assignment.look_ahead()
        return StepPlan((*decode, *prefill), len(decode), reload, self._held)

    def _mixed_budget(self, decoding: int) -> int:
        """Prefill tokens beside so many decoding rows. A step is as slow for them as its prefill is long, and as long
        as more rows wait for their first token than for their next, a longer one makes less waiting in all."""
        room = self.max_rows - len(self.running)
        late = sum(not sequence.decoding for sequence in self.running) + min(len(self.waiting), room)
        return self.max_mixed_tokens * max(late, decoding) // decoding

    def _decode_rows(self) -> Iterator[PlannedRow]:
        for sequence in list(self.running):
            if not sequence.decoding or sequence.full or self._holds(sequence):
                continue
            while not self.pages.extend(sequence.pages, len(sequence.tokens)):
                last = self.running[-1]
                self._preempt(last)
                if last is sequence:
                    break
            else:
                yield PlannedRow(sequence, sequence.computed, len(sequence.tokens), samples=True)

    def _holds(self, sequence: Sequence) -> bool:
        held = sequence.held
        self._held |= held
        return held

    def _add_chunk(self, rows: list[PlannedRow], sequence: Sequence, budget: int, *, ready: bool = False) -> int:
        """Plan as much of the sequence's prefill as the budget allows; returns the tokens that takes."""
        if budget <= 0 or not (ready or self.assignment is None or self.assignment.ready(sequence)):
            return 0
        end = min(len(sequence.tokens), sequence.computed + budget)
        samples = end == len(sequence.tokens) and sequence.draws
        rows.append(PlannedRow(sequence, sequence.computed, end, samples=samples))
        return end - sequence.computed

    def _admit(self, rows: list[PlannedRow], budget: int) -> None:
        """Move waiting sequences to the running ones while there is room, with their first chunks."""
        if budget <= 0 or len(self.running) >= self.max_rows:
            return
        passed: list[Sequence] = []
        for sequence in self.waiting.ordered():
            if sequence.awaited >= 0 or self._holds(sequence):
                return  # preempted in this very step: its last token is not read yet, and nobody may pass it
            if self.assignment is not None and not self.assignment.take(sequence):
                passed.append(sequence)
                continue
            self._reuse(sequence)
            if not self.pages.extend(sequence.pages, len(sequence.tokens)):
                self._forget_pages(sequence)
                return
            self.waiting.admit(sequence, passed)
            self.running.append(sequence)
            self.reused_tokens += sequence.computed
            budget -= self._add_chunk(rows, sequence, budget)
            if budget <= 0 or len(self.running) >= self.max_rows:
                return

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_up(sequence)
        sequence.preempted = True
        self.add(sequence)

    def _reuse(self, sequence: Sequence) -> None:
        """Give it the pages that hold what its tokens begin with. Two tokens are left to compute at least: one alone
        would look like a row that decodes. And all of a prompt that is read whole."""
        if self.prefix_cache and not (sequence.reading is not None and sequence.reading.whole_prompt):
            size = self.pages.page_size
            most = max(len(sequence.tokens) - 2, 0) // size
            extend_keys(sequence.page_keys, sequence.digest, sequence.tokens, most, size)
            sequence.pages = self.pages.share(sequence.page_keys[:most])
            sequence.computed = len(sequence.pages) * size
            sequence.published = len(sequence.pages)

    def _publish(self, sequence: Sequence) -> None:
        """Let others use its pages that are full of known tokens, computed or launched to be."""
        size = self.pages.page_size
        full = min(sequence.computed, sequence.known) // size if self.prefix_cache else 0
        if full > sequence.published:
            extend_keys(sequence.page_keys, sequence.digest, sequence.tokens, full, size)
            for page in range(sequence.published, full):
                self.pages.publish(sequence.pages[page], sequence.page_keys[page], sequence.digest)
            sequence.published = full

    def _forget_pages(self, sequence: Sequence) -> None:
        self.pages.free(sequence.pages)
        sequence.computed = sequence.published = 0

    def _give_up(self, sequence: Sequence) -> None:
        self._publish(sequence)
        self._forget_pages(sequence)
        sequence.place = -1
        if self.assignment is not None:
            self.assignment.give_up(sequence)

"""A scheduler with real pages and slots, and without a model: each planned row counts as computed."""

from __future__ import annotations

import torch

from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from engine.kv_pages import PagePool
from engine.request import GenerationRequest
from engine.scheduler import Scheduler, StepPlan
from engine.sequence import Sequence

LAYOUT = AdapterLayout("tiny", 1, (TargetGroup("o", (TargetModule("self_attn.o_proj", 2, 2),)),))


def adapter(name: str, rank: int = 4) -> PackedAdapter:
    return PackedAdapter(name, f"digest of {name}", rank, torch.ones(LAYOUT.slab_elements(rank)))


class Line:
    """A scheduler, what it did in each step, and requests by name."""

    def __init__(
        self,
        *,
        pages: int = 64,
        page_size: int = 4,
        slots: dict[int, int] | None = None,
        rows: int = 8,
        tokens: int = 64,
        overtakes: int = 4,
        mixed: int | None = None,
        late: bool = False,
    ) -> None:
        """late: a step's tokens are read after the next step was planned, as the engine does it."""
        self.pool = SlotPool(LAYOUT, slots or {4: 2}, torch.float32, "cpu")
        self.scheduler = Scheduler(
            PagePool(pages, page_size),
            self.pool,
            max_rows=rows,
            max_batch_tokens=tokens,
            max_overtakes=overtakes,
            max_mixed_tokens=mixed,
        )
        self.tokens_budget, self.rows = tokens, rows
        self.arrivals = 0
        self.steps: list[list[tuple[str, int, int]]] = []
        self.finished: dict[str, int] = {}  # name -> step
        self.packed: dict[str, PackedAdapter] = {}
        self.loading: list[Sequence] = []  # back after the step that comes next
        self.reloads: list[str] = []
        self.late = late
        self.flight: list[Sequence] = []  # whose tokens are drawn and not read
        self.stops: dict[Sequence, int] = {}  # ends when so many tokens are known

    def add(
        self,
        name: str,
        prompt: int = 4,
        new: int = 4,
        packed: PackedAdapter | None = None,
        *,
        in_slot: bool = False,
        tenant: str = "everybody",
    ) -> Sequence:
        """in_slot: host memory has the adapter no more; the request relies on the slot that holds it."""
        digest = None if packed is None else packed.digest
        request = GenerationRequest(
            name,
            tuple(range(prompt)),
            adapter=packed.name if packed else None,
            adapter_digest=digest,
            tenant=tenant,
        )
        sequence = Sequence(request, self.arrivals, prompt + new, seed=0, adapter=None if in_slot else packed)
        if packed is not None:
            self.packed[packed.digest] = packed
            assert not in_slot or self.pool.find(packed.digest) is not None
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        sequence.finished = True
        if sequence in self.loading:
            self.loading.remove(sequence)
        else:
            self.scheduler.remove(sequence)

    def step(self) -> StepPlan:
        """Plan, check what holds for every plan, and count the rows as computed."""
        loaded, self.loading = self.loading, []
        plan = self.scheduler.plan()
        running = self.scheduler.running
        for sequence in plan.reload:
            assert sequence not in running
            assert sequence not in self.scheduler.waiting
            assert (sequence.slot, sequence.pages, sequence.computed) == (None, [], 0)
            assert sequence.digest is not None
            assert self.pool.find(sequence.digest) is None
            self.loading.append(sequence)
            self.reloads.append(sequence.request.request_id)
        for sequence in loaded:
            assert sequence.digest is not None
            sequence.adapter = self.packed[sequence.digest]
            self.scheduler.add(sequence)
        assert plan.num_tokens <= self.tokens_budget
        assert len(running) <= self.rows
        assert len({id(row.sequence) for row in plan.rows}) == len(plan.rows)
        for index, row in enumerate(plan.rows):
            sequence = row.sequence
            assert sequence in running
            assert row.start == sequence.computed < row.end <= len(sequence.tokens)
            assert row.samples == (row.end == len(sequence.tokens))
            assert sequence.decoding == (index < plan.num_decode)
            assert len(sequence.pages) * self.scheduler.pages.page_size >= row.end
            if sequence.digest is not None:
                assert sequence.slot is not None
                assert sequence.slot.digest == sequence.digest
                assert self.pool.ready(sequence.slot)
        owned = [page for sequence in running for page in sequence.pages]
        assert len(owned) == len(set(owned)) == self.scheduler.pages.num_pages - self.scheduler.pages.free_pages
        self.steps.append([(row.sequence.request.request_id, row.start, row.end) for row in plan.rows])
        landing, self.flight = self.flight, [row.sequence for row in plan.rows if row.samples]
        places = iter(range(len(self.flight)))
        for row in plan.rows:
            row.sequence.launched(row.end, next(places) if row.samples else None)
        if not self.late:
            landing, self.flight = self.flight, []
        for sequence in landing:
            if not sequence.finished:
                sequence.read(1000 + sequence.known)
                if sequence.known >= min(sequence.max_tokens, self.stops.get(sequence, sequence.max_tokens)):
                    self.end(sequence)
        return plan

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        sequence.finished = True
        self.finished[sequence.request.request_id] = len(self.steps)

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.step().rows and not self.loading and not self.scheduler.waiting and not self.flight:
                break
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.pages.free_pages == self.scheduler.pages.num_pages

    def names(self, step: int = -1) -> list[str]:
        return [name for name, _, _ in self.steps[step]]

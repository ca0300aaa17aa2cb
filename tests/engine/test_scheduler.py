"""The scheduler with real pages and slots, and without a model: each planned row counts as computed."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SlotPool
from engine.kv_pages import PagePool
from engine.request import GenerationRequest
from engine.scheduler import Scheduler, StepPlan
from engine.sequence import Sequence

LAYOUT = AdapterLayout("tiny", 1, (TargetGroup("o", (TargetModule("self_attn.o_proj", 2, 2),)),))


def adapter(name: str, rank: int = 4) -> PackedAdapter:
    return PackedAdapter(name, f"digest of {name}", rank, torch.ones(rank * LAYOUT.units))


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
    ) -> None:
        self.pool = SlotPool(LAYOUT, slots or {4: 2}, torch.float32, "cpu")
        self.scheduler = Scheduler(
            PagePool(pages, page_size), self.pool, max_rows=rows, max_batch_tokens=tokens, max_overtakes=overtakes
        )
        self.tokens_budget, self.rows = tokens, rows
        self.arrivals = 0
        self.steps: list[list[tuple[str, int, int]]] = []
        self.finished: dict[str, int] = {}  # name -> step

    def add(self, name: str, prompt: int = 4, new: int = 4, packed: PackedAdapter | None = None) -> Sequence:
        request = GenerationRequest(name, tuple(range(prompt)), adapter=packed.name if packed else None)
        sequence = Sequence(request, self.arrivals, prompt + new, seed=0, adapter=packed)
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        """Plan, check what holds for every plan, and count the rows as computed."""
        plan = self.scheduler.plan()
        running = self.scheduler.running
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
            if sequence.adapter is not None:
                assert sequence.slot is not None
                assert sequence.slot.digest == sequence.adapter.digest
                assert self.pool.ready(sequence.slot)
        owned = [page for sequence in running for page in sequence.pages]
        assert len(owned) == len(set(owned)) == self.scheduler.pages.num_pages - self.scheduler.pages.free_pages
        self.steps.append([(row.sequence.request.request_id, row.start, row.end) for row in plan.rows])
        for row in plan.rows:
            row.sequence.computed = row.end
            if row.samples:
                row.sequence.tokens.append(1000 + len(row.sequence.tokens))
                if len(row.sequence.tokens) == row.sequence.max_tokens:
                    self.scheduler.remove(row.sequence)
                    self.finished[row.sequence.request.request_id] = len(self.steps)
        return plan

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.step().rows:
                break
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.pages.free_pages == self.scheduler.pages.num_pages

    def names(self, step: int = -1) -> list[str]:
        return [name for name, _, _ in self.steps[step]]


def test_decode_rows_come_first_and_prefill_takes_the_rest() -> None:
    line = Line(tokens=10)
    line.add("a", prompt=4)
    line.step()
    line.add("b", prompt=20)
    line.add("c", prompt=3)
    line.step()
    assert line.steps[1] == [("a", 4, 5), ("b", 0, 9)]
    line.step()
    assert line.steps[2] == [("a", 5, 6), ("b", 9, 18)]
    line.step()
    assert line.steps[3] == [("a", 6, 7), ("b", 18, 20), ("c", 0, 3)]
    line.run()


def test_rows_are_limited_and_served_in_order_of_arrival() -> None:
    line = Line(rows=2)
    for name in "abcd":
        line.add(name, new=2)
    line.step()
    assert line.names() == ["a", "b"]
    line.run()
    assert line.finished["a"] == line.finished["b"] < line.finished["c"] == line.finished["d"]


def test_a_sequence_that_is_added_late_keeps_its_place() -> None:
    line = Line(rows=1)
    early = line.add("early")
    line.add("late")
    line.scheduler.remove(early)
    line.scheduler.add(early)
    line.step()
    assert line.names() == ["early"]


def test_no_pages_left_preempts_the_newest_and_keeps_its_tokens() -> None:
    line = Line(pages=4, page_size=4)
    old, new = line.add("old", prompt=7, new=8), line.add("new", prompt=7, new=8)
    while not line.scheduler.preemptions:
        line.step()
    assert line.names() == ["old"]
    assert (new.computed, new.pages, new.slot) == (0, [], None)
    generated = list(new.tokens)
    assert len(generated) > 7
    line.run()
    assert new.tokens[: len(generated)] == generated
    # It came back as one prefill of everything it had, and drew the next token only.
    assert ("new", 0, len(generated)) in [row for step in line.steps for row in step]
    assert len(new.tokens) == len(old.tokens) == 15
    assert line.finished["old"] < line.finished["new"]


def test_a_long_prompt_is_not_passed_by_short_ones_for_ever() -> None:
    line = Line(pages=8, page_size=4, rows=8)
    line.add("first", prompt=8, new=4)
    line.step()
    line.add("long", prompt=28, new=2)
    for index in range(8):
        line.add(f"short{index}", prompt=4, new=2)
    line.step()
    assert line.names() == ["first"]
    line.run()
    assert line.finished["long"] < line.finished["short0"]


def test_a_request_without_a_slot_is_passed_over() -> None:
    line = Line(slots={4: 1})
    line.add("a1", packed=adapter("a"), new=6)
    line.add("b1", packed=adapter("b"))
    line.add("a2", packed=adapter("a"))
    line.add("base")
    line.step()
    assert line.names() == ["a1", "a2", "base"]
    line.run()
    assert line.finished["b1"] > line.finished["a1"]
    assert (line.pool.stats().misses, line.pool.stats().evictions) == (2, 1)


def test_a_large_adapter_without_a_slot_does_not_stop_a_small_one() -> None:
    line = Line(slots={4: 2, 8: 1})
    line.add("big1", packed=adapter("x", 8), new=9)
    line.add("big2", packed=adapter("y", 8))
    line.add("small", packed=adapter("z", 4))
    line.step()
    assert line.names() == ["big1", "small"]


def test_adapters_of_the_queue_are_put_out_last() -> None:
    line = Line(slots={4: 2})
    for name in ("a", "b"):
        line.add(name, packed=adapter(name), new=1)
    line.run()
    line.add("c", packed=adapter("c"))
    line.add("again", packed=adapter("a"))
    line.run()
    assert line.pool.stats().hits == 1  # c took b's slot, although a was the older


def test_removal_frees_pages_and_the_slot_at_once() -> None:
    line = Line(slots={4: 1})
    first = line.add("first", packed=adapter("a"), new=50)
    queued = line.add("queued", packed=adapter("b"))
    line.step()
    line.scheduler.remove(first)
    assert line.scheduler.pages.free_pages == line.scheduler.pages.num_pages
    line.step()
    assert line.names() == ["queued"]
    line.scheduler.remove(queued)
    assert not line.scheduler.running
    assert not line.step().rows


@pytest.mark.parametrize("classes", [{4: 1}, {4: 3}])
def test_a_cold_adapter_is_served_under_a_saturating_hot_one(classes: dict[int, int]) -> None:
    """Law 7: with every slot kept busy, a cold request waits for ``max_overtakes`` admissions and one generation."""
    line = Line(slots=classes, rows=8, overtakes=5)
    hot = [adapter(f"hot{index}") for index in range(classes[4])]
    waited = ahead = 0
    cold: Sequence | None = None
    for step in range(200):
        while len(line.scheduler.waiting) < 12:
            line.add(f"hot at {line.arrivals}", packed=hot[line.arrivals % len(hot)], new=1 + line.arrivals % 7)
        if step == 20:
            cold = line.add("cold", packed=adapter("cold"), new=2)
            ahead = len(line.scheduler.waiting)
        line.step()
        if cold is not None and "cold" in line.finished:
            waited = line.finished["cold"] - 20
            break
    assert cold is not None
    # Those ahead in the queue are admitted at 1 a step or faster; then 5 overtakes; then at most 7 tokens of the
    # rows that still use the slot; then its own 2 steps.
    assert 0 < waited <= ahead + 5 + 7 + 2


def test_every_cold_adapter_gets_its_turn() -> None:
    line = Line(slots={4: 2}, rows=4, overtakes=3)
    hot = [adapter("hot0"), adapter("hot1")]
    for index in range(6):
        line.add(f"cold{index}", packed=adapter(f"cold{index}"), new=3)
    for _ in range(150):
        while sum(sequence.adapter in hot for sequence in line.scheduler.waiting) < 6:
            line.add(f"hot at {line.arrivals}", packed=hot[line.arrivals % 2], new=4)
        line.step()
    assert {f"cold{index}" for index in range(6)} <= set(line.finished)
    assert sum(name.startswith("hot") for name in line.finished) > 50


def test_a_drained_slot_that_another_took_is_drained_anew() -> None:
    """Two that starve drain a slot each; the first takes the one that the second was promised, and turns hot."""
    line = Line(slots={4: 2}, rows=6, overtakes=0)
    line.add("long", packed=adapter("a"), new=40)
    line.add("short", packed=adapter("b"), new=6)
    line.step()
    first, second = line.add("first", packed=adapter("c"), new=4), line.add("second", packed=adapter("d"), new=2)
    line.step()
    assert (first.draining, second.draining) == ("digest of b", "digest of a")
    line.scheduler.remove(line.scheduler.running[0])  # "long" leaves: what "second" waits for is what "first" takes
    line.step()
    assert first.slot is not None
    assert second.slot is None
    for _ in range(60):
        while len(line.scheduler.waiting) < 4:
            line.add(f"hot at {line.arrivals}", packed=adapter("c" if line.arrivals % 2 else "b"), new=4)
        line.step()
    assert "second" in line.finished


requests = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step it arrives before
        st.integers(1, 40),  # prompt
        st.integers(1, 12),  # new tokens
        st.sampled_from(["", "", "a", "b", "c", "d", "E"]),  # adapter; E has the larger rank
        st.sampled_from([None, None, None, 3]),  # aborted after so many steps
    ),
    max_size=16,
)


@settings(deadline=None, max_examples=200)
@given(requests, st.integers(13, 40), st.integers(1, 6), st.sampled_from([6, 9, 100]))
def test_any_traffic_is_served_whole_and_in_bounds(
    traffic: Iterable[tuple[int, int, int, str, int | None]], pages: int, rows: int, tokens: int
) -> None:
    line = Line(pages=pages, page_size=4, slots={4: 2, 8: 1}, rows=rows, tokens=tokens, overtakes=2)
    todo = sorted(traffic, key=lambda entry: entry[0])
    sequences: list[Sequence] = []
    aborts: dict[int, Sequence] = {}
    for step in range(2000):
        while todo and todo[0][0] <= step:
            _, prompt, new, name, abort_after = todo.pop(0)
            packed = adapter(name, 8 if name.isupper() else 4) if name else None
            sequence = line.add(f"r{line.arrivals}", prompt, new, packed)
            if abort_after is None:
                sequences.append(sequence)
            else:
                aborts[step + abort_after] = sequence
        if (leaving := aborts.pop(step, None)) and leaving.request.request_id not in line.finished:
            line.scheduler.remove(leaving)
        plan = line.step()
        if not plan.rows and not todo and not aborts:
            break
        assert plan.rows or not (line.scheduler.running or line.scheduler.waiting), "work left but nothing planned"
    for sequence in sequences:
        assert len(sequence.tokens) == sequence.max_tokens
        done = [row for step in line.steps for row in step if row[0] == sequence.request.request_id]
        assert sum(end == len(sequence.tokens) - 1 for _, _, end in done) == 1
    assert line.scheduler.pages.free_pages == pages
    assert all(slot.refs == 0 for slot in line.pool._slots)

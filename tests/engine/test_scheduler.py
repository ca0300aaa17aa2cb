"""The scheduler's promises, on traffic whose rows count as computed when planned."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sequence import Sequence
from tests.engine.scheduled import Line, adapter


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


def test_prefill_beside_decoding_rows_is_bounded() -> None:
    line = Line(tokens=64, mixed=4)
    line.add("a", prompt=30)
    line.add("b", prompt=30)
    line.step()
    assert line.steps[0] == [("a", 0, 30), ("b", 0, 30)], "nobody decodes yet"
    line.add("c", prompt=10)
    for start, end in ((0, 4), (4, 8), (8, 10)):
        line.step()
        assert line.steps[-1][2:] == [("c", start, end)]
        assert [name for name, _, _ in line.steps[-1][:2]] == ["a", "b"]
    line.run()


def test_prefill_may_take_longer_where_more_rows_wait_for_it_than_decode() -> None:
    line = Line(tokens=64, mixed=4, rows=8)
    line.add("a", prompt=4, new=16)
    line.step()
    for name in "bcdefghijk":
        line.add(name, prompt=8)
    line.step()
    assert sum(end - start for _, start, end in line.steps[-1][1:]) == 7 * 4, "seven rows wait that there is room for"
    line.step()
    assert line.steps[1][1:] == [("b", 0, 8), ("c", 0, 8), ("d", 0, 8), ("e", 0, 4)]
    assert line.steps[2][4:] == [("e", 4, 8)], "as many decode as wait"
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


def test_adapters_of_the_queue_are_evicted_last() -> None:
    line = Line(slots={4: 2})
    for name in ("a", "b"):
        line.add(name, packed=adapter(name), new=1)
    line.run()
    line.add("c", packed=adapter("c"))
    line.add("again", packed=adapter("a"))
    line.run()
    assert line.pool.stats().hits == 1  # c took b's slot, although a was the older


def test_decode_rows_of_one_adapter_stand_side_by_side_and_those_without_last() -> None:
    line = Line(slots={4: 2})
    for name, own in (("1", "a"), ("2", None), ("3", "b"), ("4", "a"), ("5", None), ("6", "b")):
        line.add(name, packed=adapter(own) if own else None)
    line.step()
    line.step()
    assert [name for name, _, _ in line.steps[1]] == ["3", "6", "1", "4", "2", "5"]
    line.run()


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


def test_a_resident_adapter_needs_no_host_copy() -> None:
    line = Line(slots={4: 1})
    line.add("first", packed=adapter("a"), new=1)
    line.run()
    again = line.add("again", packed=adapter("a"), new=6, in_slot=True)
    line.step()
    assert line.names() == ["again"]
    assert again.slot is not None
    assert again.slot.refs == 1
    line.add("other", packed=adapter("b"), new=1)
    line.step()
    assert line.names() == ["again"], "a slot in use was given away"
    line.run()
    assert line.reloads == []
    assert line.pool.stats().hits == 1


def test_a_resident_adapter_that_is_evicted_before_its_request_runs_is_loaded_again() -> None:
    line = Line(slots={4: 1}, rows=1)
    line.add("first", packed=adapter("a"), new=1)
    line.run()
    line.add("cold", packed=adapter("b"), new=4)  # before the next in the queue, and of another adapter
    line.add("relies", packed=adapter("a"), in_slot=True)
    line.add("base", new=2)
    line.step()
    assert line.names() == ["cold"]
    assert line.reloads == ["relies"]  # in the step that put it out, so that the load runs beside the others
    line.run()
    assert line.reloads == ["relies"]
    assert line.finished["cold"] < line.finished["relies"] < line.finished["base"]


def test_a_preempted_row_comes_before_those_who_came_earlier() -> None:
    line = Line(pages=6, page_size=4, slots={4: 1})
    line.add("old", prompt=12, new=9)
    row = line.add("row", prompt=7, new=8, packed=adapter("a"))
    line.step()
    early = line.add("early", prompt=1, new=1, packed=adapter("b"))
    line.scheduler.remove(early)
    early.arrival, early.adapter = -1, adapter("b")
    line.scheduler.add(early)
    while not line.scheduler.preemptions:
        line.step()
    tokens = list(row.tokens)
    assert len(tokens) > 7
    assert line.names() == ["old"]
    line.run()
    assert line.finished["old"] < line.finished["row"] < line.finished["early"]
    assert line.reloads == []
    assert row.tokens[: len(tokens)] == tokens


def test_a_drained_adapter_takes_no_requests_that_rely_on_its_slot() -> None:
    """Law 7 for requests without a host copy: they do not keep the slot that another one's starvation drains."""
    line = Line(slots={4: 1}, rows=4, overtakes=2)
    line.add("hot", packed=adapter("hot"), new=3)
    line.step()
    cold = line.add("cold", packed=adapter("cold"), new=2)
    for step in range(40):
        while len(line.scheduler.waiting) < 6:
            in_slot = line.pool.find("digest of hot") is not None
            line.add(f"hot at {line.arrivals}", packed=adapter("hot"), new=3, in_slot=in_slot)
        line.step()
        if "cold" in line.finished:
            assert step <= 2 + 3 + 2 + 1
            break
    assert cold.request.request_id in line.finished
    assert line.reloads, "those that relied on the drained slot"
    line.run()
    assert len(line.finished) == line.arrivals


@pytest.mark.parametrize("ends", [False, True])
def test_a_row_preempted_while_its_token_is_under_way_stays_where_it_can_be_ended(ends: bool) -> None:
    """Its slot is given to another adapter (as a pin does) before its token is read, and that may be its last."""

    def run(stop: int | None) -> tuple[Line, Sequence, int]:
        line = Line(pages=6, page_size=4, slots={4: 1}, late=True)
        line.add("base", prompt=12, new=9)
        row = line.add("row", prompt=7, new=8, packed=adapter("a"))
        if stop is not None:
            line.stops[row] = stop
        while not line.scheduler.preemptions:
            line.step()
        return line, row, row.known

    _, _, known = run(None)
    line, row, _ = run(known if ends else None)
    assert row.finished == ends
    if not ends:
        assert line.scheduler.assignment is not None
        assert line.scheduler.assignment.to_slot(adapter("b"), spare=False)
        assert row in line.scheduler.waiting
    line.run()
    assert len(line.finished) == line.arrivals
    assert ends or line.reloads == ["row"]


requests = st.lists(
    st.tuples(
        st.integers(0, 30),  # the step it arrives before
        st.integers(1, 40),  # prompt
        st.integers(1, 12),  # new tokens
        st.sampled_from(["", "", "a", "b", "c", "d", "E"]),  # adapter; E has the larger rank
        st.sampled_from([None, None, None, 3]),  # aborted after so many steps
        st.booleans(),  # whether host memory has lost the adapter, if a slot has it
        st.sampled_from([None, None, 1, 2, 5]),  # ends after so many new tokens, whatever was asked for
    ),
    max_size=16,
)


@settings(deadline=None, max_examples=200)
@given(requests, st.integers(13, 40), st.integers(1, 6), st.sampled_from([6, 9, 100]))
@pytest.mark.parametrize("late", [False, True])
def test_any_traffic_is_served_whole_and_in_bounds(
    late: bool,
    traffic: Iterable[tuple[int, int, int, str, int | None, bool, int | None]],
    pages: int,
    rows: int,
    tokens: int,
) -> None:
    line = Line(pages=pages, page_size=4, slots={4: 2, 8: 1}, rows=rows, tokens=tokens, overtakes=2, late=late)
    todo = sorted(traffic, key=lambda entry: entry[0])
    sequences: list[Sequence] = []
    aborts: dict[int, Sequence] = {}
    for step in range(2000):
        while todo and todo[0][0] <= step:
            _, prompt, new, name, abort_after, dropped, stop = todo.pop(0)
            packed = adapter(name, 8 if name.isupper() else 4) if name else None
            in_slot = dropped and packed is not None and line.pool.find(packed.digest) is not None
            sequence = line.add(f"r{line.arrivals}", prompt, new, packed, in_slot=in_slot)
            if stop is not None:
                line.stops[sequence] = prompt + stop
            if abort_after is None:
                sequences.append(sequence)
            else:
                aborts[step + abort_after] = sequence
        if (leaving := aborts.pop(step, None)) and leaving.request.request_id not in line.finished:
            line.remove(leaving)
        loading, flight = list(line.loading), list(line.flight)
        plan = line.step()
        if not plan.rows and not todo and not aborts and not line.loading and not loading and not flight:
            break
        left = {*line.scheduler.waiting, *line.scheduler.running}
        assert plan.rows or flight or left <= set(loading), "work left but nothing planned"
    for sequence in sequences:
        assert sequence.known == min(sequence.max_tokens, line.stops.get(sequence, sequence.max_tokens))
        done = [row for step in line.steps for row in step if row[0] == sequence.request.request_id]
        assert sum(end == sequence.known - 1 for _, _, end in done) == 1
    assert line.scheduler.pages.free_pages == pages
    assert all(slot.refs == 0 for slot in line.pool._slots)

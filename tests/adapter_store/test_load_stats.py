"""Counting of loads."""

from __future__ import annotations

import pytest

from adapter_store.load_stats import SECONDS_BOUNDS, LoadMeter, LoadTotals


def test_every_piece_of_work_is_counted_once_by_its_outcome_and_its_time() -> None:
    meter = LoadMeter()
    with meter.measure() as work:
        work.bytes = 7
    with pytest.raises(OSError, match="x"), meter.measure() as work:
        work.bytes = 5
        raise OSError("x")
    totals = meter.totals
    assert (totals.done, totals.failed, totals.bytes) == (1, 1, 7)
    assert sum(totals.by_seconds) == 2 and totals.seconds >= 0


def test_a_time_counts_in_the_smallest_bound_that_holds_it() -> None:
    def place(seconds: float) -> int:
        return LoadTotals.once(seconds, 0, done=True).by_seconds.index(1)

    assert [place(bound) for bound in SECONDS_BOUNDS] == list(range(len(SECONDS_BOUNDS)))
    assert place(0.0) == 0 and place(1e9) == len(SECONDS_BOUNDS)
    both = LoadTotals.once(0.0, 3, done=True) + LoadTotals.once(1e9, 3, done=False)
    assert (both.by_seconds[0], both.by_seconds[-1], sum(both.by_seconds), both.bytes) == (1, 1, 2, 3)


def test_the_seconds_of_each_bound_are_kept() -> None:
    total = sum((LoadTotals.once(seconds, 0, done=True) for seconds in (0.03, 0.04, 2.0)), LoadTotals())
    spent = dict(zip(SECONDS_BOUNDS, total.spent, strict=False))
    assert {bound: seconds for bound, seconds in spent.items() if seconds} == {0.05: pytest.approx(0.07), 2.5: 2.0}
    assert total.seconds == pytest.approx(2.07)

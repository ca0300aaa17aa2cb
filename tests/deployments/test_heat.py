"""Which adapters are hot: counts that cool down, at a replica and over all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.hub import FleetHub
from deployments.news.message import ReplicaNews
from deployments.scaling import heat
from deployments.scaling.heat import HALF_LIFE_SECONDS, HeatMeter, HeatTable, HotAdapter, added_up, packed, unpacked


def asked(meter, times, now):
    for digest, count in times.items():
        for _ in range(count):
            meter.asked(f"local:{digest}", digest, now)


def test_what_is_asked_for_more_is_hotter_and_cools_down():
    meter = HeatMeter()
    asked(meter, {"a": 3, "b": 1, "c": 2}, 0.0)
    first = meter.hottest(2, {"a": 8}, 0.0)
    assert first == (HotAdapter("local:a", "a", 8, 3.0), HotAdapter("local:c", "c", 0, 2.0))
    asked(meter, {"b": 2}, HALF_LIFE_SECONDS)
    assert [(one.digest, one.heat) for one in meter.hottest(9, {}, HALF_LIFE_SECONDS)] == [
        ("b", pytest.approx(2.5)),
        ("a", pytest.approx(1.5)),
        ("c", pytest.approx(1.0)),
    ]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 40 * HALF_LIFE_SECONDS)), max_size=60))
def test_the_counts_are_exact_over_days(requests):
    """Also when the table starts to count anew in between."""
    meter, expected, now = HeatMeter(), {}, 0.0
    for digest, later in requests:
        now += later
        expected = {name: value * 0.5 ** (later / HALF_LIFE_SECONDS) for name, value in expected.items()}
        expected[digest] = expected.get(digest, 0.0) + 1
        meter.asked(digest, digest, now)
    told = {one.digest: one.heat for one in meter.hottest(9, {}, now)}
    assert told == pytest.approx(expected, abs=1e-9)


def test_a_replica_counts_so_many_adapters_and_no_more(monkeypatch):
    monkeypatch.setattr(heat, "MOST_COUNTED", 50)
    meter = HeatMeter()
    asked(meter, {"hot": 3}, 0.0)
    asked(meter, {f"cold-{number}": 1 for number in range(500)}, 1.0)
    kept = meter.hottest(1000, {}, 2.0)
    assert kept[0].digest == "hot" and len(kept) <= 101


def test_the_hub_adds_up_and_remembers_those_that_are_gone():
    table = HeatTable()
    table.tell("r1", [HotAdapter("x", "a", 16, 4.0), HotAdapter("y", "b", 0, 3.0)], 0.0)
    table.tell("r2", [HotAdapter("y", "b", 8, 3.0)], HALF_LIFE_SECONDS)
    told = table.hottest(9, HALF_LIFE_SECONDS)
    assert [(one.digest, one.rank, one.heat) for one in told] == [("b", 8, 4.5), ("a", 16, 2.0)]
    table.tell("r2", [], HALF_LIFE_SECONDS + 2)
    assert [one.digest for one in table.hottest(1, HALF_LIFE_SECONDS + 2)] == ["a"]
    table.tell("r2", [], 2 * heat.FORGET_AFTER_SECONDS)
    assert table.hottest(9, 2 * heat.FORGET_AFTER_SECONDS) == []


def test_many_that_start_at_once_cost_one_sum():
    table = HeatTable()
    table.tell("r1", [HotAdapter("x", "a", 0, 1.0)], 0.0)
    assert len(table.hottest(9, 0.0)) == 1
    table.tell("r1", [HotAdapter("x", "a", 0, 1.0), HotAdapter("y", "b", 0, 1.0)], 0.5)
    assert len(table.hottest(9, 0.5)) == 1
    assert len(table.hottest(9, 1.5)) == 2


def test_an_adapter_that_several_know_is_added_up():
    one, other = HotAdapter("x", "a", 0, 1.0), HotAdapter("x", "a", 16, 2.0)
    assert added_up([one, other]) == added_up([other, one]) == [HotAdapter("x", "a", 16, 3.0)]


def test_what_outlasts_a_hub_has_cooled_down_by_then():
    adapters = [HotAdapter("hub:acme/x@v1", "a", 16, 4.0), HotAdapter("local:/y", "b", 0, 1.0)]
    data = packed(adapters, 1000.0)
    assert unpacked(data, 1000.0) == adapters
    assert [one.heat for one in unpacked(data, 1000.0 + HALF_LIFE_SECONDS)] == [2.0, 0.5]
    assert unpacked(data, 900.0) == adapters, "a clock that goes back heats nothing up"
    assert unpacked(data, 1000.0 + heat.FORGET_AFTER_SECONDS) == []


async def test_the_hub_gives_the_hottest_and_who_runs():
    hub = FleetHub()
    await hub.tell_heat("gone", [HotAdapter("x", "a", 0, 1.0), HotAdapter("y", "b", 0, 3.0)])
    await hub.publish(ReplicaNews("here", 0, whole=True))
    hottest, replicas = await hub.hottest(1)
    assert [one.digest for one in hottest] == ["b"] and replicas == ("here",)

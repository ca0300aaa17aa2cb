"""What a router believes: news, corrected by what it did itself since."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.routing.fleet_view import FleetView, ReplicaLoad, Tier
from deployments.routing.placement_policy import PlacementPolicy

NAMES = ["a", "b", "c"]


@pytest.fixture
def view():
    made = FleetView(PlacementPolicy(rank_rows=0.0, prediction_ttl_s=1.0))
    made.keep_only(NAMES)
    for name in NAMES:
        made.report(name, ReplicaLoad(max_rows=8))
    return made


def held(view, adapter, now=0.0):
    return {tier: {view.names[i] for i in indices} for tier, indices in view.holders(adapter, now).items() if indices}


def loads(view):
    return dict(zip(view.names, view.loads.tolist(), strict=True))


def test_each_tier_is_known_and_the_best_one_counts(view):
    view.change("a", Tier.HOST, ["x", "y"], [])
    view.change("a", Tier.RESIDENT, ["x"], [])
    view.change("b", Tier.LOADING, ["x"], [])
    assert held(view, "x") == {Tier.RESIDENT: {"a"}, Tier.LOADING: {"b"}}
    view.change("a", Tier.RESIDENT, [], ["x"])
    assert held(view, "x") == {Tier.HOST: {"a"}, Tier.LOADING: {"b"}}
    view.replace("a", Tier.HOST, ["y", "z"])
    assert held(view, "x") == {Tier.LOADING: {"b"}}
    assert held(view, "y") == held(view, "z") == {Tier.HOST: {"a"}}


def test_a_routed_request_counts_at_once_and_until_it_is_finished(view):
    view.routed("a", "x", now=10.0)
    assert loads(view) == {"a": 1 / 8, "b": 0, "c": 0}
    assert view.demand("x") == 1 and held(view, "x", 10.0) == {Tier.LOADING: {"a"}}
    assert held(view, "x", 100.0) == {Tier.LOADING: {"a"}}  # it is still under way
    view.finished("a", "x")
    assert loads(view)["a"] == 0 and view.demand("x") == 0
    assert held(view, "x", 10.9) == {Tier.LOADING: {"a"}} and held(view, "x", 11.0) == {}


def test_news_replace_what_was_counted_and_own_requests_come_on_top_of_them(view):
    view.routed("a", "x", now=0.0)
    view.report("a", ReplicaLoad(running=3, waiting=1, max_rows=8, rows={"x": 1, "y": 2}))
    assert loads(view)["a"] == 4 / 8 and view.demand("x") == 1 and view.demand("y") == 2
    view.routed("a", "x", now=0.1)
    assert loads(view)["a"] == 5 / 8 and view.demand("x") == 2
    view.finished("a", "x")
    view.finished("a", "x")
    view.finished("a", "x")  # one that was never routed
    assert loads(view)["a"] == 3 / 8 and view.demand("x") == 0


def test_news_from_before_its_own_requests_do_not_make_a_router_forget_them(view):
    for _ in range(3):
        view.routed("a", "x", now=0.0)
    view.routed("a", "", now=0.0)
    view.report("a", ReplicaLoad(running=1, max_rows=8, rows={"x": 1}))
    assert loads(view)["a"] == 4 / 8 and view.demand("x") == 3
    for _ in range(3):
        view.finished("a", "x")
    assert loads(view)["a"] == 1 / 8 and view.demand("x") == 0


def test_ranks_in_the_batch_make_a_replica_costlier_but_not_fuller():
    view = FleetView(PlacementPolicy(rank_rows=0.5))
    view.keep_only(["a"])
    view.report("a", ReplicaLoad(running=2, max_rows=8, ranks=4))
    assert loads(view) == {"a": 2 / 8} and view.costs.tolist() == [(2 + 2) / 8]


def test_residency_news_end_a_prediction(view):
    view.routed("a", "x", now=0.0)
    view.finished("a", "x")
    view.change("a", Tier.RESIDENT, ["x"], [])
    view.change("a", Tier.RESIDENT, [], ["x"])
    assert held(view, "x", 0.1) == {}


def test_a_forgotten_replica_keeps_only_what_this_router_has_there(view):
    view.change("a", Tier.RESIDENT, ["x"], [])
    view.report("a", ReplicaLoad(running=6, max_rows=8, saturated=True, rows={"x": 6}))
    view.routed("a", "y", now=0.0)
    view.forget("a")
    assert held(view, "x") == {} and view.demand("x") == 0 and view.demand("y") == 1
    assert loads(view)["a"] == 1 / 8 and view.closed.tolist() == [0, 0, 0]


def test_a_replica_that_is_gone_takes_everything_with_it(view):
    view.change("a", Tier.HOST, ["x"], [])
    view.routed("a", "y", now=0.0)
    view.keep_only(["b", "c", "d"])
    assert view.names == ("b", "c", "d") and len(view.loads) == 3
    assert held(view, "x") == held(view, "y") == {} and view.demand("y") == 0
    for late in (view.finished,):
        late("a", "y")
    view.report("a", ReplicaLoad(running=1))
    view.change("a", Tier.RESIDENT, ["x"], [])
    view.keep_only(["a", "b", "c"])
    assert held(view, "x") == {} and loads(view) == {"a": 0, "b": 0, "c": 0}


def test_predictions_do_not_pile_up(view):
    for tick in range(1000):
        view.routed("a", str(tick), now=20 + tick / 10)
        view.finished("a", str(tick))
    assert len(view._predicted) <= 11 and len(view._expiries) <= 11


def test_rows_that_the_engine_has_not_heard_of_yet_weigh_all_the_same(view):
    view.report("a", ReplicaLoad(running=1, max_rows=8, rows={"x": 6}))
    assert loads(view)["a"] == 6 / 8
    view.report("a", ReplicaLoad(running=9, max_rows=8, rows={"x": 6}))  # three of the base model
    assert loads(view)["a"] == 9 / 8


def test_hot_adapters_gain_copies_at_once_and_lose_them_after_a_quiet_while():
    view = FleetView(PlacementPolicy(spread_at=0.5, shrink_at=0.5, shrink_after_s=5.0))
    names = [f"r{i}" for i in range(16)]
    view.keep_only(names)
    for name in names:
        view.report(name, ReplicaLoad(max_rows=8))
    for _ in range(32):
        view.routed("r0", "x", now=0.0)
    assert view.copies("x") == 9  # 33 rows, 4 to a copy
    for _ in range(32):
        view.finished("r0", "x")
    view.routed("r0", "x", now=1.0)
    assert view.copies("x") == 8
    seen = []
    for tick in range(2, 60):
        view.routed("r0", "x", now=float(tick))
        view.finished("r0", "x")
        seen.append(view.copies("x"))
    assert seen == sorted(seen, reverse=True) and seen[0] == 8 and seen[-1] == 1
    assert not view._copies._held


actions = st.lists(
    st.one_of(
        st.tuples(st.just("routed"), st.sampled_from(NAMES), st.sampled_from("xyz")),
        st.tuples(st.just("finished"), st.sampled_from(NAMES), st.sampled_from("xyz")),
        st.tuples(
            st.just("report"), st.sampled_from(NAMES), st.dictionaries(st.sampled_from("xyz"), st.integers(1, 9))
        ),
        st.tuples(st.just("forget"), st.sampled_from(NAMES)),
        st.tuples(st.just("keep_only"), st.lists(st.sampled_from(NAMES), min_size=1, unique=True)),
        st.tuples(st.just("replace"), st.sampled_from(NAMES), st.sampled_from(Tier), st.sets(st.sampled_from("xyz"))),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=80)
@given(actions)
def test_the_books_agree_whatever_happens(steps):
    view = FleetView(PlacementPolicy(rank_rows=0.0))
    view.keep_only(NAMES)
    for now, (name, *arguments) in enumerate(steps):
        if name == "routed":
            view.routed(*arguments, now)
        elif name == "report":
            replica, rows = arguments
            # One row of the base model; or the engine has not heard yet of rows that its replica counts already.
            running = sum(rows.values()) + (1 if now % 2 else -len(rows))
            view.report(replica, ReplicaLoad(running=running, max_rows=4, rows=rows))
        else:
            getattr(view, name)(*arguments)
        known = [view._replicas[replica] for replica in view.names]
        for replica in known:
            assert replica.row_count == sum(replica.rows.values()) >= 0
            assert all(count > 0 for count in (*replica.rows.values(), *replica.own.values()))
            step = view.step_rows if replica.load is None else replica.load.max_rows
            assert view.loads[replica.index] == replica.row_count / step
        for adapter in "xyz":
            assert view.demand(adapter) == sum(replica.rows.get(adapter, 0) for replica in known)
            holders = view.holders(adapter, now)
            assert holders[Tier.RESIDENT] == [r.index for r in known if adapter in r.tiers[Tier.RESIDENT]]
        assert set(view._holders) == {a for r in known for tier in r.tiers.values() for a in tier}

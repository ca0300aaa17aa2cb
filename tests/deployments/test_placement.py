"""The placement policy, by property and by example."""

from __future__ import annotations

from collections import OrderedDict, deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.placement import SINGLES, Choice, PlacementRequest, Reason, place, rendezvous_weights
from deployments.routing.fleet_view import FleetView, ReplicaLoad, Tier
from deployments.routing.placement_policy import PlacementPolicy

laws = settings(deadline=None, max_examples=60)  # not a test of the machine's speed

STEP = 8  # rows one step of these replicas holds
ADAPTERS = ["1a", "2b", "3c", "4d"]


def fleet(count=4, **policy):
    view = FleetView(PlacementPolicy(**policy))
    view.keep_only([f"replica-{i:04}" for i in range(count)])
    for name in view.names:
        view.report(name, ReplicaLoad(max_rows=STEP))
    return view


def rows(view, replica, count, **load):
    """The replica says that so many rows run there."""
    view.report(replica, ReplicaLoad(running=count, max_rows=STEP, **load))


def homes(view, adapter):
    """Names by rendezvous weight, the home first."""
    weights = rendezvous_weights(adapter, view.hashes)
    return [view.names[i] for i in reversed(weights.argsort())]


def first(view, adapter, now=0.0, **request):
    return place(view, PlacementRequest(adapter, **request), now)[0]


@st.composite
def views(draw):
    view = FleetView(PlacementPolicy(prediction_ttl_s=1.0))
    names = draw(st.lists(st.text("abcdef0123456789", min_size=4, max_size=8), min_size=1, max_size=12, unique=True))
    view.keep_only(names)
    for name in names:
        if draw(st.booleans()):
            demand = draw(st.dictionaries(st.sampled_from(ADAPTERS), st.integers(1, 20), max_size=3))
            load = ReplicaLoad(
                running=sum(demand.values()),
                waiting=draw(st.integers(0, 20)),
                max_rows=draw(st.sampled_from([1, 8, 64])),
                ranks=draw(st.integers(0, 256)),
                free_slots=draw(st.sampled_from([(), ((16, 0),), ((16, 3), (64, 0)), ((16, 0), (64, 1))])),
                saturated=draw(st.integers(0, 3)) == 0,
                draining=draw(st.integers(0, 5)) == 0,
                rows=demand,
            )
            view.report(name, load)
        for tier in Tier:
            view.replace(name, tier, draw(st.sets(st.sampled_from(ADAPTERS), max_size=2)))
    for name in view.names:
        if draw(st.booleans()):
            view.routed(name, draw(st.sampled_from(["", *ADAPTERS])), now=0.0)
    return view


@st.composite
def requests(draw, view_names=()):
    return PlacementRequest(draw(st.sampled_from(["", *ADAPTERS, "nowhere"])))


@laws
@given(views(), requests(), st.data())
def test_a_ranking_names_replicas_that_exist_once_each_and_somebody(view, request, data):
    avoid = frozenset(data.draw(st.sets(st.sampled_from([*view.names, "gone"]))))
    request = PlacementRequest(request.adapter, avoid)
    names = [choice.replica for choice in place(view, request, 0.5)]
    assert 1 <= len(names) == len(set(names)) <= SINGLES
    assert set(names) <= set(view.names)


@laws
@given(views(), requests(), st.data())
def test_nobody_saturated_draining_or_avoided_is_named_while_another_can_serve(view, request, data):
    avoid = frozenset(data.draw(st.sets(st.sampled_from(view.names))))
    able = {name for name, closed in zip(view.names, view.closed, strict=True) if not closed and name not in avoid}
    ranking = place(view, PlacementRequest(request.adapter, avoid), 0.5)
    if able:
        assert {choice.replica for choice in ranking} <= able
    else:
        # A draining one refuses for certain; one that is full or failed a moment ago may not.
        hopeful = {name for name, closed in zip(view.names, view.closed, strict=True) if closed < 2}
        assert not hopeful or {choice.replica for choice in ranking} <= hopeful


@laws
@given(views(), requests())
def test_the_same_view_gives_the_same_answer(view, request):
    assert place(view, request, 0.5) == place(view, request, 0.5)


@laws
@given(views(), requests(), st.randoms())
def test_the_order_in_which_replicas_became_known_does_not_matter(view, request, random):
    other = FleetView(view.policy)
    names = list(view.names)
    random.shuffle(names)
    other.keep_only(names)
    random.shuffle(names)
    for name in names:
        known = view._replicas[name]
        if known.load is not None:
            other.report(name, known.load)
        for tier, adapters in known.tiers.items():
            other.replace(name, tier, adapters)
    for name in view.names:
        for adapter in view._replicas[name].own:
            other.routed(name, adapter, 0.0)
    assert place(other, request, 0.5) == place(view, request, 0.5)


@laws
@given(views(), st.sampled_from(ADAPTERS))
def test_a_resident_copy_is_preferred_to_all_else_unless_it_is_busy(view, adapter):
    able = [index for index, closed in enumerate(view.closed) if not closed]
    resident = [index for index in view.holders(adapter, 0.5)[Tier.RESIDENT] if index in able]
    if not resident:
        return
    choice = first(view, adapter, 0.5)
    if choice.reason is not Reason.RESIDENT:
        best = min(view.loads[index] for index in resident)
        chosen = view.names.index(choice.replica)
        assert view.loads[chosen] < best
        assert best > view.policy.spill_at or view.wanted(adapter) > len(resident)


@laws
@given(st.integers(1, 40), st.integers(1, 200))
def test_base_model_requests_balance(replicas, count):
    view = fleet(replicas)
    for _ in range(count):
        view.routed(first(view, "").replica, "", now=0.0)
    assert view.loads.max() - view.loads.min() <= 1 / STEP


@laws
@given(st.integers(2, 12), st.integers(8, 16), st.integers(0, 2**32))
def test_adapters_that_outnumber_the_slots_do_not_thrash(replicas, slots, seed):
    """A small closed loop: about as many loads as when each adapter had one home for ever, however busy that is."""
    random = Random(seed)
    view, under_way, places = fleet(replicas), deque(), {}
    ours, plain = (_Caches(replicas, slots) for _ in range(2))
    for turn in range(500):
        while under_way and under_way[0][0] <= turn:
            view.finished(*under_way.popleft()[1:])
        adapter = f"adapter-{int(random.expovariate(1 / (replicas * slots)))}"
        replica = first(view, adapter, turn / 10).replica
        view.routed(replica, adapter, turn / 10)
        under_way.append((turn + replicas * STEP // 2, replica, adapter))  # half of what the steps hold
        places.setdefault(adapter, set()).add(replica)
        view.change(replica, Tier.RESIDENT, *ours.use(replica, adapter))
        plain.use(homes(view, adapter)[0], adapter)
    assert ours.loads <= 1.1 * plain.loads + replicas
    assert sum(map(len, places.values())) <= 1.5 * len(places)


class _Caches:
    """The slots of each replica, the least recently used given up first."""

    def __init__(self, replicas, slots):
        self.slots, self.loads, self.held = slots, 0, {}

    def use(self, replica, adapter):
        """What came to the replica's slots and what left them."""
        held = self.held.setdefault(replica, OrderedDict())
        came = [adapter] if adapter not in held else []
        self.loads += len(came)
        held[adapter] = None
        held.move_to_end(adapter)
        return came, [held.popitem(last=False)[0]] if len(held) > self.slots else []


def test_copies_come_at_once_go_after_a_while_and_do_not_flap():
    view = fleet(8, spread_at=0.5, shrink_at=0.5, shrink_after_s=5.0)
    used, now = [], 0.0
    for second in range(40):
        burst = 16 if second < 10 or second == 12 else 1
        chosen = []
        for _ in range(burst):
            chosen.append(first(view, "hot", now).replica)
            view.routed(chosen[-1], "hot", now)
            view.change(chosen[-1], Tier.RESIDENT, ["hot"], [])
        for replica in chosen:
            view.finished(replica, "hot")
        used.append(len(set(chosen)))
        now += 1.0
    copies = len(view.holders("hot", now)[Tier.RESIDENT])
    assert 4 <= copies <= 5  # 16 rows, 4 to a copy; every burst found the same ones
    assert min(used[:10]) >= 4 and used[12] >= 4
    assert view.copies("hot") == 1


def test_a_copy_lost_after_a_burst_comes_back_with_the_next_burst_and_not_before():
    view = fleet(4, spread_at=0.5)
    home, second, *_ = homes(view, "x")
    for replica in (home, second):
        view.change(replica, Tier.RESIDENT, ["x"], [])
    for _ in range(STEP // 2 + 1):
        view.routed(home, "x", now=0.0)
    assert view.copies("x") == view.wanted("x") == 2
    for _ in range(STEP // 2):
        view.finished(home, "x")
    view.change(second, Tier.RESIDENT, [], ["x"])
    assert (view.copies("x"), view.wanted("x")) == (2, 1)
    assert first(view, "x", 1.0) == Choice(home, Reason.RESIDENT)
    for _ in range(STEP // 2):
        view.routed(home, "x", now=2.0)
    assert first(view, "x", 2.0) == Choice(second, Reason.SPREAD)


def test_all_replicas_full_means_no_new_copies():
    view = fleet(4)
    home, *_ = homes(view, "x")
    view.change(home, Tier.RESIDENT, ["x"], [])
    for name in view.names:
        rows(view, name, 3 * STEP, rows={"x": 1})
    assert first(view, "x") == Choice(home, Reason.RESIDENT)
    rows(view, homes(view, "x")[2], 1)
    assert first(view, "x") == Choice(homes(view, "x")[2], Reason.SPREAD)


def test_another_copy_is_made_where_the_adapter_is_in_host_memory():
    view = fleet(4)
    home, _, third, _ = homes(view, "x")
    view.change(home, Tier.RESIDENT, ["x"], [])
    view.change(third, Tier.HOST, ["x"], [])
    rows(view, home, 2 * STEP)
    assert first(view, "x") == Choice(third, Reason.SPREAD)


def test_base_model_requests_take_turns_between_equally_loaded_replicas():
    view, seen = fleet(4), []
    for _ in range(8):
        chosen = first(view, "").replica
        view.routed(chosen, "", now=0.0)
        view.finished(chosen, "")
        seen.append(chosen)
    assert sorted(seen[:4]) == list(view.names) and seen[4:] == seen[:4]


def test_base_model_requests_go_to_the_replica_with_fewer_ranks_in_its_batch():
    view = fleet(2)
    for name, ranks in zip(view.names, (64, 0), strict=True):
        rows(view, name, 2, ranks=ranks)
    assert first(view, "").replica == view.names[1]


def test_without_any_news_routers_agree_on_homes_and_spread_adapters_evenly():
    started, other = (FleetView(PlacementPolicy()) for _ in range(2))
    names = [f"replica-{i}" for i in range(8)]
    started.keep_only(names)
    other.keep_only(names[::-1])
    counts = dict.fromkeys(names, 0)
    for number in range(2000):
        choice = first(started, f"adapter-{number}")
        assert choice == first(other, f"adapter-{number}") and choice.reason is Reason.HOME
        counts[choice.replica] += 1
    assert min(counts.values()) > 180 and max(counts.values()) < 320


@laws
@given(st.integers(2, 30), st.integers(0, 29))
def test_a_replica_that_goes_moves_its_own_adapters_alone(count, lost):
    adapters = [f"adapter-{i}" for i in range(200)]
    before, after = fleet(count), fleet(count)
    gone = before.names[lost % count]
    after.keep_only([name for name in before.names if name != gone])
    for adapter in adapters:
        was, now = first(before, adapter), first(after, adapter)
        assert (was != now) == (was.replica == gone)
        if was != now:
            assert now.replica == homes(before, adapter)[1]


def test_a_router_without_news_keeps_to_homes_while_it_has_some_requests_under_way():
    view = FleetView(PlacementPolicy())
    view.keep_only([f"replica-{i}" for i in range(4)])
    for _ in range(8):
        chosen = first(view, "x").replica
        assert chosen == homes(view, "x")[0]
        view.routed(chosen, "x", 0.0)


def test_what_waits_for_its_load_is_joined_and_a_host_cached_copy_beats_an_idle_home():
    view = fleet()
    home, second, third, _ = homes(view, "x")
    view.change(second, Tier.HOST, ["x"], [])
    assert [c.reason for c in place(view, PlacementRequest("x"), 0.0)[:2]] == [Reason.HOST_CACHED, Reason.HOME]
    view.change(third, Tier.LOADING, ["x"], [])
    assert first(view, "x") == Choice(third, Reason.LOADING)
    view.change(home, Tier.RESIDENT, ["x"], [])
    assert first(view, "x") == Choice(home, Reason.RESIDENT)


def test_requests_of_one_tick_follow_the_first_one_to_its_home():
    view = fleet()
    home = first(view, "x").replica
    for _ in range(3):
        view.routed(home, "x", 0.0)
        assert first(view, "x") == Choice(home, Reason.LOADING)


def test_a_cold_adapter_passes_over_a_home_that_is_far_busier_than_the_rest():
    view = fleet(home_load_factor=1.25, home_load_slack=0.25)
    home, second, *_ = homes(view, "x")
    rows(view, home, 2)
    assert first(view, "x") == Choice(home, Reason.HOME)
    rows(view, home, 8)
    assert first(view, "x") == Choice(second, Reason.HOME)


def test_a_cold_adapter_passes_over_a_home_without_a_slot_to_give_while_another_has_one():
    view = fleet()
    home, second, *others = homes(view, "x")
    rows(view, home, 1, free_slots=((16, 0), (64, 1)))
    assert first(view, "x").replica == home
    rows(view, home, 1, free_slots=((16, 0), (64, 0)))
    assert first(view, "x").replica == second
    for name in (second, *others):
        rows(view, name, 1, free_slots=((16, 0), (64, 0)))
    assert first(view, "x").replica == home
    # It does not leave a home that can take it for the sake of a lesser load.
    rows(view, home, 2, free_slots=((16, 1),))
    assert first(view, "x").replica == home


def test_a_hot_adapter_takes_a_second_replica_and_both_share_its_work():
    view = fleet(spread_at=0.5)
    home, second, *_ = homes(view, "hot")
    view.change(home, Tier.RESIDENT, ["hot"], [])
    rows(view, home, 3, rows={"hot": 3})
    assert first(view, "hot") == Choice(home, Reason.RESIDENT)
    rows(view, home, 4, rows={"hot": 4})
    assert first(view, "hot") == Choice(second, Reason.SPREAD)
    # Not where it would be no better off.
    for name in view.names:
        if name != home:
            rows(view, name, 4)
    assert first(view, "hot") == Choice(home, Reason.RESIDENT)
    view.change(second, Tier.RESIDENT, ["hot"], [])
    rows(view, second, 3, rows={"hot": 3})
    assert first(view, "hot") == Choice(second, Reason.RESIDENT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spread_at", 0), ("spread_at", float("nan")), ("shrink_at", 1.5), ("max_copies", 0), ("home_load_factor", 0.5),
        ("home_load_slack", -1), ("spill_at", -1), ("rank_rows", -0.1), ("prediction_ttl_s", -1),
        ("shrink_after_s", -1),
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} is"):
        PlacementPolicy(**{field: value})

"""Who is next: virtual token counters, the waiting queue's order, and the bounds that follow (law 7)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.fairness import TokenCounters, TokenWeights
from engine.request import GenerationRequest
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from tests.engine.scheduled import Line, adapter


def sequence(arrival: int, tenant: str, prompt: int = 4) -> Sequence:
    return Sequence(GenerationRequest(f"r{arrival}", (7,) * prompt, tenant=tenant), arrival, prompt + 4, seed=0)


def names(queue: WaitingQueue) -> list[int]:
    return [one.arrival for one in queue.ordered()]


# --- counters and order ---------------------------------------------------------------------------------------------


def test_a_token_counts_by_its_kind_and_its_tenants_share() -> None:
    counters = TokenCounters(TokenWeights(1.0, 2.0, {"gold": 4.0}))
    for tenant in ("gold", "plain"):
        counters.lift(tenant, ())
        counters.prompt(tenant, 100)
        for _ in range(10):
            counters.drawn(tenant)
    assert (counters["plain"], counters["gold"]) == (120.0, 30.0)


def test_a_share_that_comes_with_requests_goes_before_the_settings_and_is_forgotten_with_its_tenant() -> None:
    counters = TokenCounters(TokenWeights(1.0, 2.0, {"gold": 4.0}))
    queue = WaitingQueue(counters, 4)
    for arrival, (tenant, share) in enumerate((("gold", 2.0), ("gold", None), ("plain", 0.5), ("other", None))):
        request = GenerationRequest(f"r{arrival}", tuple(range(100)), tenant=tenant, share=share)
        queue.add(Sequence(GenerationRequest.from_dict(request.to_dict()), arrival, max_tokens=200, seed=0))
    for one in list(queue.ordered()):
        queue.admit(one, ())
    assert (counters["gold"], counters["plain"], counters["other"]) == (100.0, 200.0, 100.0)
    for number in range(5000):
        counters.lift(f"t{number}", ())
        counters.leave(f"t{number}")
    assert not counters._shares


def test_time_away_earns_no_credit() -> None:
    counters = TokenCounters(TokenWeights())
    counters.lift("busy", ())
    counters.prompt("busy", 1000)
    counters.lift("late", ("busy",))
    assert counters["late"] == 1000, "lifted to the least of those who wait"
    counters.prompt("late", 50)
    counters.leave("busy")
    counters.leave("late")
    counters.lift("new", ())
    assert counters["new"] == 1050, "nobody waits: lifted to the last who was served"
    counters.lift("late", ("new",))
    assert counters["late"] == 1050, "who had more keeps it"


def test_tenants_that_do_not_come_back_are_forgotten() -> None:
    counters = TokenCounters(TokenWeights())
    for number in range(10_000):
        counters.lift(f"t{number}", ())
        counters.prompt(f"t{number}", 1)
        counters.leave(f"t{number}")
    assert len(counters) < 5000
    counters.lift("t0", ())
    assert counters["t0"] == 10_000, "and begin where everybody is"


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = WaitingQueue(TokenCounters(TokenWeights()), 4)
    for arrival in (3, 1, 2, 0):
        queue.add(sequence(arrival, ""))
    assert names(queue) == [0, 1, 2, 3]


def test_the_tenant_that_had_least_is_next_and_admission_changes_who_that_is() -> None:
    queue = WaitingQueue(TokenCounters(TokenWeights()), 100)
    for arrival, tenant, prompt in ((0, "a", 10), (1, "a", 10), (2, "a", 10), (3, "b", 5), (4, "b", 5), (5, "b", 5)):
        queue.add(sequence(arrival, tenant, prompt))
    admitted = []
    for one in queue.ordered():
        admitted.append(one.arrival)
        queue.admit(one, ())
    assert admitted == [0, 3, 4, 1, 5, 2]
    assert len(queue) == 0


events = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "admit", "remove", "drawn"]), st.integers(0, 4), st.integers(1, 30)
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(events, st.integers(0, 5))
def test_the_order_is_the_one_that_is_written_down(history: list[tuple[str, int, int]], max_overtakes: int) -> None:
    counters = TokenCounters(TokenWeights())
    queue = WaitingQueue(counters, max_overtakes)
    waiting: list[Sequence] = []
    for arrival, (event, tenant, size) in enumerate(history):
        if event == "add":
            one = sequence(arrival, f"t{tenant}", size)
            one.preempted = size % 7 == 0
            queue.add(one)
            waiting.append(one)
        elif event == "drawn":
            counters.drawn(f"t{tenant}")
        elif waiting:
            one = next(queue.ordered()) if event == "admit" else waiting[size % len(waiting)]
            waiting.remove(one)
            (queue.admit(one, ()) if event == "admit" else queue.remove(one))

        def place(one: Sequence) -> tuple[int, float, int]:
            mine = [o for o in waiting if o.tenant == one.tenant]
            first = min(mine, key=lambda o: (not o.preempted, o.arrival)) is one
            if one.preempted:
                return 0, 0.0, one.arrival
            if first and one.age >= max_overtakes:
                return 1, 0.0, one.arrival
            return 2, counters[one.tenant], one.arrival

        assert list(queue.ordered()) == sorted(waiting, key=place)
        assert [queue.order(one) for one in waiting] == [place(one) for one in waiting]
        assert set(queue) == set(waiting)
        assert all(one in queue for one in waiting)
        assert queue.tenants() == Counter(one.tenant for one in waiting)


# --- the scheduler under it -----------------------------------------------------------------------------------------


def service(line: Line) -> dict[str, float]:
    return {tenant: line.scheduler.counters[tenant] for tenant in ("a", "b", "c")}


@pytest.mark.parametrize("pages", [13, 400])
def test_every_token_is_counted_once_whatever_is_preempted(pages: int) -> None:
    line = Line(pages=pages, page_size=4, rows=4, tokens=16, late=True)
    want: Counter[str] = Counter()
    rng = random.Random(5)
    for index in range(40):
        tenant, prompt, new = rng.choice("abc"), rng.randint(1, 20), rng.randint(1, 12)
        line.add(f"{index}", prompt=prompt, new=new, tenant=tenant)
        want[tenant] += prompt + 2 * new
    line.run()
    assert service(line) == dict(want)
    assert bool(line.scheduler.preemptions) == (pages == 13)


@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0)])
def test_backlogged_tenants_get_equal_service_by_their_shares(shares: tuple[float, float]) -> None:
    """Twice the larger of a prompt and what a full batch may generate: the bound of the paper, whatever
    the tenants ask for."""
    rows, prompt, new = 4, 24, 20
    line = Line(rows=rows, tokens=64, overtakes=10**6, pages=400)
    line.scheduler.counters._weights = TokenWeights(tenants=dict(zip("ab", shares, strict=True)))
    bound = 2 * max(prompt, 2 * rows * (prompt + new)) / min(shares)
    rng = random.Random(3)
    worst = 0.0
    for step in range(1500):
        for tenant, sizes in (("a", (2, prompt, 8, new)), ("b", (1, 3, 1, 3))):  # large requests against small ones
            while sum(one.tenant == tenant for one in line.scheduler.waiting) < 6:
                line.add(f"{line.arrivals}", rng.randint(*sizes[:2]), rng.randint(*sizes[2:]), tenant=tenant)
        line.step()
        if step > 10:
            worst = max(worst, abs(line.scheduler.counters["a"] - line.scheduler.counters["b"]))
    assert worst <= bound
    assert min(line.scheduler.counters["a"], line.scheduler.counters["b"]) > 5 * bound, "both were served all the time"


def saturate(line: Line, tenant: str, adapters: int, waiting: int = 30) -> None:
    """Keep the tenant's queue full; its requests take 1 to 7 new tokens."""
    while sum(one.tenant == tenant for one in line.scheduler.waiting) < waiting:
        own = adapter(f"{tenant}-{line.arrivals % adapters}") if adapters else None
        line.add(f"{tenant} at {line.arrivals}", packed=own, new=1 + line.arrivals % 7, tenant=tenant)


def waited(line: Line, name: str, hot: Iterator[None], limit: int = 2000) -> int:
    """Steps from now until the request is done, while others keep coming."""
    since = len(line.steps)
    for _ in range(limit):
        next(hot)
        line.step()
        if name in line.finished:
            return line.finished[name] - since
    pytest.fail(f"{name} is not served")


def test_law_7_a_cold_tenant_is_next_when_a_row_is_free() -> None:
    line = Line(rows=4, overtakes=50)

    def hot() -> Iterator[None]:
        while True:
            saturate(line, "hot", 0)
            yield

    source = hot()
    for _ in range(50):
        next(source)
        line.step()
    line.add("cold", new=3, tenant="cold")
    assert len(line.scheduler.waiting) > 25
    # The rows that run have 7 tokens to go at most; then its own 3, and a step for what is launched already.
    assert waited(line, "cold", source) <= 7 + 3 + 1


@pytest.mark.parametrize("hot_adapters", [1, 3, 9])
@pytest.mark.parametrize("classes", [{4: 1}, {4: 3}])
def test_law_7_a_cold_tenant_gets_a_slot_however_many_adapters_the_hot_one_has(
    classes: dict[int, int], hot_adapters: int
) -> None:
    overtakes, longest = 5, 7
    line = Line(rows=6, overtakes=overtakes, slots=classes)

    def hot() -> Iterator[None]:
        while True:
            saturate(line, "hot", hot_adapters)
            yield

    source = hot()
    for _ in range(50):
        next(source)
        line.step()
    for index in range(4):
        line.add(f"cold{index}", packed=adapter(f"cold{index}"), new=2, tenant=f"cold{index}")
        # First in the queue at once. Others are admitted beside it, one in ``longest`` steps at the slowest, until it
        # has been overtaken often enough; then the slot's users end; then its own tokens.
        assert waited(line, f"cold{index}", source) <= overtakes * longest + longest + 2 + 1


def test_law_7_tenants_that_keep_coming_do_not_keep_out_one_that_had_much() -> None:
    """Each comes once and has had nothing; the tenant with the large counter is overtaken, but not for ever."""

    def run(overtakes: int) -> int:
        line = Line(rows=2, overtakes=overtakes)

        def others() -> Iterator[None]:
            while True:
                while len(line.scheduler.waiting) < 6:
                    line.add(f"once {line.arrivals}", new=2, tenant=f"tenant {line.arrivals}")
                yield

        source = others()
        next(source)
        line.step()
        line.add("first", prompt=40, new=20, tenant="large")
        waited(line, "first", source)
        line.add("again", new=2, tenant="large")
        return waited(line, "again", source, limit=400)

    assert run(10) <= (10 + 1) * 2 + 2 + 1
    with pytest.raises(pytest.fail.Exception, match="again is not served"):
        run(10**6)


def test_an_old_queue_of_one_tenant_does_not_come_before_everybody() -> None:
    """Only its first grows old: a hundred old requests do not turn fairness into first come first served."""
    line = Line(rows=2, overtakes=4)
    for index in range(100):
        line.add(f"old {index}", prompt=8, new=4, tenant="old")
    served: Counter[str] = Counter()
    for _ in range(120):
        while sum(one.tenant == "small" for one in line.scheduler.waiting) < 4:
            line.add(f"small {line.arrivals}", prompt=2, new=2, tenant="small")
        line.step()
    for name in line.finished:
        served[name.split()[0]] += 1
    assert served["old"] < 30
    assert served["small"] > 2 * served["old"]


def test_adapters_of_rows_that_wait_for_room_are_in_their_slots_when_it_comes() -> None:
    line = Line(rows=1, slots={4: 3})
    line.add("long", new=12)
    for name in "abcd":
        line.add(name, packed=adapter(name), new=1)
    for _ in range(5):
        line.step()
    assert [line.pool.find(f"digest of {name}") is not None for name in "abcd"] == [True, True, True, False]
    assert line.scheduler.assignment is not None
    assert line.scheduler.assignment.prefetches == 3
    waiting = {one.request.request_id: one for one in line.scheduler.waiting}
    assert [waiting[name].adapter is None for name in "abcd"] == [True, True, True, False]
    line.run()
    assert line.reloads == []
    assert line.pool.stats().misses == 4


def test_nothing_that_waits_is_put_out_for_what_waits_behind_it() -> None:
    line = Line(rows=1, slots={4: 1})
    line.add("first", packed=adapter("a"), new=1)
    line.run()
    line.add("long", new=6)
    line.step()
    line.add("again", packed=adapter("a"))
    line.add("behind", packed=adapter("b"))
    for _ in range(3):
        line.step()
    assert line.pool.find("digest of a") is not None
    line.run()
    assert line.pool.stats().evictions == 1

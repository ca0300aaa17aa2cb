"""What the ledger promises, against a model that remembers everything."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.tenants.ledger import LATE_SECONDS, OWNER_SECONDS, WINDOW_SECONDS, Entry, Ledger
from deployments.tenants.tenant import Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Remembered:
    """One request of the model: when it was let in, its tokens now, when it got them, and whether it runs."""

    at: float
    tokens: int = 0
    charged_at: float | None = None
    running: bool = True


steps = st.lists(
    st.tuples(st.sampled_from(["enter", "enter", "charge", "leave", "wait"]), st.integers(0, 40), st.integers(0, 30)),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(1, 6), st.integers(20, 80), st.integers(1, 4))
def test_nothing_over_a_limit_is_let_in_and_nothing_under_it_refused(history, requests, tokens, concurrency) -> None:
    clock, limits = Clock(), Limits(requests, tokens, concurrency)
    ledger = Ledger(clock)
    known: list[Remembered] = []

    def recent(at: float | None) -> bool:
        return at is not None and at > clock.now - WINDOW_SECONDS

    for event, which, size in history:
        if event == "wait":
            # Gateways confirm what runs every second, so none of them is taken for gone.
            for _ in range(size):
                clock.now += 1.0
                ledger.confirm("gateway", [str(number) for number, one in enumerate(known) if one.running])
        elif event == "enter":
            let_in = sum(recent(one.at) for one in known)
            running = sum(one.running for one in known)
            expected = "concurrency" if running >= concurrency else "requests" if let_in >= requests else None
            verdict = ledger.enter("gateway", str(len(known)), "acme", limits)
            assert verdict.refused == expected
            if expected is None:
                known.append(Remembered(clock.now))
                assert verdict.requests is not None and verdict.requests.remaining == requests - let_in - 1
            elif expected == "requests":
                earlier, clock.now = clock.now, clock.now + verdict.retry_after_s
                assert sum(recent(one.at) for one in known) < requests, "to come again then is not in vain"
                clock.now = earlier
        elif known and known[which % len(known)].running:
            number = which % len(known)
            one = known[number]
            if event == "leave":
                one.running = False
                if one.charged_at is not None:
                    one.tokens = min(size, one.tokens)
                ledger.leave("gateway", str(number), one.tokens)
            elif one.charged_at is None:
                used = sum(other.tokens for other in known if recent(other.charged_at))
                wanted = size + 1
                verdict = ledger.charge("gateway", str(number), wanted, limits)
                assert (verdict.refused is None) == (used + wanted <= tokens)
                if verdict.refused is None:
                    one.tokens, one.charged_at = wanted, clock.now
                    assert verdict.tokens is not None and verdict.tokens.remaining == tokens - used - wanted
                else:
                    one.running = False
                    assert verdict.refused == ("never" if wanted > tokens else "tokens")
                    clock.now += verdict.retry_after_s
                    assert verdict.refused == "never" or wanted <= tokens - sum(
                        other.tokens for other in known if recent(other.charged_at)
                    )
                    clock.now -= verdict.retry_after_s


def test_the_same_request_twice_is_let_in_once() -> None:
    ledger = Ledger(Clock())
    for _ in range(3):
        verdict = ledger.enter("gateway", "one", "acme", Limits(requests_per_minute=2, concurrency=2))
        assert verdict.refused is None
        assert verdict.requests is not None and verdict.requests.remaining == 1
    for _ in range(2):
        verdict = ledger.charge("gateway", "one", 10, Limits(tokens_per_minute=15))
        assert verdict.refused is None and verdict.tokens is not None and verdict.tokens.remaining == 5


def test_tenants_do_not_use_each_others() -> None:
    ledger = Ledger(Clock())
    one = Limits(requests_per_minute=1, concurrency=1)
    assert [ledger.enter("g", f"{tenant}{n}", tenant, one).refused for tenant in "ab" for n in range(2)] == [
        None,
        "concurrency",
    ] * 2


def test_what_a_gateway_that_is_gone_let_in_runs_no_more() -> None:
    clock, limits = Clock(), Limits(concurrency=2)
    ledger = Ledger(clock)
    for lease in "ab":
        assert ledger.enter("dies", lease, "acme", limits).refused is None
    assert ledger.enter("lives", "c", "acme", limits).refused == "concurrency"
    clock.now += OWNER_SECONDS - 1
    assert ledger.enter("lives", "c", "acme", limits).refused == "concurrency", "it may be slow"
    clock.now += 2
    assert [ledger.enter("lives", lease, "acme", limits).refused for lease in "cde"] == [None, None, "concurrency"]


def test_a_gateway_that_was_only_slow_gets_its_own_back_and_nobody_comes_in_on_top() -> None:
    clock, limits = Clock(), Limits(concurrency=1, tokens_per_minute=100)
    ledger = Ledger(clock)
    ledger.enter("slow", "a", "acme", limits)
    ledger.charge("slow", "a", 60, limits)
    clock.now += OWNER_SECONDS + 1
    ledger.confirm("other", [])
    assert ledger.confirm("slow", ["a"]) == ["a"]
    ledger.resume("slow", [Entry("a", "acme", 11.0, 60, 11.0)])
    assert ledger.confirm("slow", ["a"]) == []
    assert ledger.enter("other", "b", "acme", limits).refused == "concurrency"
    ledger.leave("slow", "a", 5)
    assert ledger.enter("other", "b", "acme", limits).refused is None
    assert ledger.charge("other", "b", 41, limits).refused == "tokens", "what it was given counts still, once"
    clock.now += WINDOW_SECONDS
    ledger.enter("other", "c", "acme", limits)
    assert ledger.charge("other", "c", 100, limits).refused is None


def test_an_end_that_got_lost_is_made_good_by_the_next_confirmation() -> None:
    clock, limits = Clock(), Limits(concurrency=1)
    ledger = Ledger(clock)
    ledger.enter("gateway", "a", "acme", limits)
    ledger.confirm("gateway", [])
    assert ledger.enter("gateway", "b", "acme", limits).refused == "concurrency", "news of it may be under way"
    clock.now += LATE_SECONDS + 1
    ledger.confirm("gateway", [])
    assert ledger.enter("gateway", "b", "acme", limits).refused is None


def test_a_new_ledger_that_was_told_what_the_old_one_knew_decides_as_it_would_have() -> None:
    clock, limits = Clock(), Limits(requests_per_minute=3, tokens_per_minute=100, concurrency=3)
    ledger = Ledger(clock)
    ledger.restore("gateway", [Entry("a", "acme", 59.0, 40, 58.0, running=False), Entry("b", "acme", 5.0, 30, 5.0)])
    assert ledger.enter("gateway", "c", "acme", limits).refused is None
    assert ledger.charge("gateway", "c", 30, limits).refused is None
    assert ledger.enter("gateway", "d", "acme", limits).refused == "requests"
    clock.now += 2
    assert ledger.enter("gateway", "d", "acme", limits).refused is None
    assert ledger.charge("gateway", "d", 41, limits).refused == "tokens"
    assert ledger.enter("gateway", "d", "acme", limits).refused == "requests", "it was let in, and counts"


def test_tenants_that_came_and_went_take_no_memory() -> None:
    clock = Clock()
    ledger = Ledger(clock)
    for number in range(5000):
        ledger.enter("gateway", str(number), f"tenant{number}", Limits(requests_per_minute=1))
        ledger.leave("gateway", str(number), 0)
        clock.now += 0.1
    assert len(ledger._accounts) < 2500

"""What a replica tells of its adapters: every change once, in the best tier, and never more than the limit."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.news.holdings import Holdings
from deployments.news.message import Changes
from deployments.routing.fleet_view import Tier

KEYS = st.sampled_from([f"{number:016x}" for number in range(12)])


def told(replica: dict[Tier, set[str]], changes: Changes) -> None:
    """What a reader makes of it; refuses what is said twice."""
    for tier in Tier:
        for key in changes.removed[tier]:
            replica[tier].remove(key)
    for tier in Tier:
        assert not changes.added[tier] & replica[tier]
        replica[tier] |= changes.added[tier]


class HoldingsMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(1, 14))
    def start(self, limit: int) -> None:
        self.limit = limit
        self.holdings = Holdings(limit)
        self.slots: set[str] = set()
        self.host: set[str] = set()
        self.asked: list[str] = []
        self.reader: dict[Tier, set[str]] = {tier: set() for tier in Tier}

    @rule(keys=st.sets(KEYS, max_size=4))
    def fill_slots(self, keys: set[str]) -> None:
        self.slots = keys
        self.holdings.in_slots(keys)

    @rule(key=KEYS, held=st.booleans())
    def change_host_memory(self, key: str, held: bool) -> None:
        (self.host.add if held else self.host.discard)(key)
        self.holdings.in_host(key, held=held)

    @rule(key=KEYS)
    def ask(self, key: str) -> None:
        self.asked.append(key)
        self.holdings.asked(key)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.holdings.left(self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1))))

    @rule()
    def tell(self) -> None:
        told(self.reader, self.holdings.changes())
        assert not self.holdings.changes()
        everything: dict[Tier, set[str]] = {tier: set() for tier in Tier}
        whole = self.holdings.everything()
        told(everything, Changes(whole.added, dict.fromkeys(Tier, frozenset())))
        assert everything == self.reader
        here = self.expected()
        for tier in Tier:
            assert self.reader[tier] <= here[tier], "nothing is told that is not so"
        count = sum(map(len, self.reader.values()))
        assert count <= self.limit
        if sum(map(len, here.values())) <= self.limit and not self.was_over():
            assert self.reader == here

    def was_over(self) -> bool:
        return self.limit < 12

    def expected(self) -> dict[Tier, set[str]]:
        loading = set(self.asked) - self.slots
        return {Tier.RESIDENT: set(self.slots), Tier.LOADING: loading, Tier.HOST: self.host - self.slots - loading}

    @invariant()
    def rows_are_counted(self) -> None:
        assert self.holdings.rows == {key: self.asked.count(key) for key in set(self.asked)}
        for tier, keys in self.expected().items():
            assert all(self.holdings.where(key) is tier for key in keys)


TestHoldings = HoldingsMachine.TestCase
TestHoldings.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_over_the_limit_the_hottest_are_told():
    holdings = Holdings(limit=4)
    keys = [f"{number:016x}" for number in range(6)]
    for key in keys:
        holdings.in_host(key, held=True)
    reader: dict[Tier, set[str]] = {tier: set() for tier in Tier}
    told(reader, holdings.changes())
    assert reader[Tier.HOST] == set(keys[2:]), "those brought in last"
    holdings.in_slots([keys[2]])
    assert holdings.asked(keys[0]), "it is news that it will be in a slot"
    told(reader, holdings.changes())
    assert (reader[Tier.RESIDENT], reader[Tier.LOADING]) == ({keys[2]}, {keys[0]})
    assert reader[Tier.HOST] == {keys[4], keys[5]}, "the one that came first made room"
    assert not holdings.asked(keys[0])
    holdings.left(keys[0])
    assert holdings.left(keys[0]), "in host memory again"
    told(reader, holdings.changes())
    assert reader[Tier.HOST] == {keys[0], keys[4], keys[5]}


def test_a_request_for_what_is_in_a_slot_is_no_news():
    holdings = Holdings()
    holdings.in_slots(["a" * 16])
    assert holdings.changes()
    assert not holdings.asked("a" * 16)
    assert not holdings.left("a" * 16)
    assert not holdings.changes()

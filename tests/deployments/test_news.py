"""What crosses the wire about a replica: the same on both sides, and small."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from deployments.news.holdings import MOST_KEYS, Holdings
from deployments.news.message import Changes, ReplicaNews, pack_keys, pack_load, unpack_keys, unpack_load
from deployments.routing.fleet_view import ReplicaLoad, Tier

KEY = st.integers(0, 2**64 - 1).map("{:016x}".format)
GROUPS = st.fixed_dictionaries({tier: st.frozensets(KEY, max_size=5) for tier in Tier})
COUNT = st.integers(0, 2**32 - 1)
LOADS = st.builds(
    ReplicaLoad,
    *([COUNT] * 4),
    st.lists(st.tuples(COUNT, COUNT), max_size=4).map(tuple),
    st.booleans(),
    st.booleans(),
    st.dictionaries(KEY, COUNT, max_size=5),
)


@given(GROUPS, GROUPS)
def test_keys_come_out_as_they_went_in(added, removed):
    changes = Changes(added, removed)
    assert unpack_keys(pack_keys(changes)) == changes


@given(LOADS)
def test_a_load_comes_out_as_it_went_in(load):
    assert unpack_load(pack_load(load)) == load


def test_ten_thousand_adapters_are_80_kilobytes_and_a_change_is_40_bytes():
    holdings = Holdings()
    for number in range(MOST_KEYS + 5000):
        holdings.in_host(f"{number:016x}", held=True)
    holdings.changes()
    whole = ReplicaNews("replica", 1, True, pack_keys(holdings.everything()))
    assert len(pickle.dumps(whole)) < 8 * MOST_KEYS + 300
    holdings.in_slots([f"{MOST_KEYS:016x}"])
    assert len(pack_keys(holdings.changes())) == 24 + 2 * 8, "it came to one tier and left another"
    rows = {f"{number:016x}": 1 for number in range(64)}
    assert len(pack_load(ReplicaLoad(64, 0, 64, 1024, ((16, 3), (64, 0)), rows=rows))) < 850

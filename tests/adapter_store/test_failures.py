"""What failed is remembered for a while, by what it is about."""

from __future__ import annotations

import time

import pytest

from adapter_store.errors import AdapterNotFound, AdapterRefused
from adapter_store.failures import RecentFailures


def test_a_failure_is_answered_under_the_name_asked_for_until_its_time_is_over() -> None:
    failures = RecentFailures(ttl_s=0.15)
    failures.check("d1", "mine")
    failures.add("d1", AdapterRefused("theirs", "because"))
    with pytest.raises(AdapterRefused, match="adapter 'mine': because"):
        failures.check("d1", "mine")
    failures.check("d2", "mine")
    assert (len(failures), failures.repeated) == (1, 1)
    time.sleep(0.2)
    failures.check("d1", "mine")
    assert (len(failures), failures.repeated) == (0, 1)


def test_what_is_forgotten_is_tried_again() -> None:
    failures = RecentFailures(ttl_s=60)
    failures.add("a", AdapterNotFound("a", "gone"))
    failures.forget("a")
    failures.forget("never there")
    failures.check("a", "a")


def test_made_up_names_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_store.failures._MAX_REMEMBERED", 100)
    failures = RecentFailures(ttl_s=60)
    for number in range(250):
        failures.add(number, AdapterNotFound(str(number), "nothing there"))
    assert len(failures) == 100
    failures.check(149, "x")
    with pytest.raises(AdapterNotFound):
        failures.check(150, "x")

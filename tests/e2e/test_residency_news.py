"""The router knows where adapters are from the replicas' news, not only from its own decisions."""

from __future__ import annotations

import time

from examples.demo.words import ADAPTERS, held_out_prompts


def test_a_request_long_after_the_last_one_goes_where_its_adapter_is(server, other):
    prompt = held_out_prompts(1)[0]
    for adapter in ADAPTERS[:2]:
        other.call("generate", {"model": adapter, "prompt": prompt, "max_tokens": 1})
    time.sleep(2.5)  # longer than the router's own predictions last
    before = other.call("routing_counters")
    misses = sum(one["slot_misses"] for one in other.call("fleet_stats"))
    for adapter in ADAPTERS[:2]:
        other.call("generate", {"model": adapter, "prompt": prompt, "max_tokens": 1})
    after = other.call("routing_counters")
    assert after["resident"] - before["resident"] == 2
    assert sum(one["slot_misses"] for one in other.call("fleet_stats")) == misses

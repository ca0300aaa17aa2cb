"""The router inside Serve's own base class, against fake replicas. No cluster."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from deployments.placement import Reason, rendezvous_weights
from deployments.router import AdapterRouter
from deployments.routing.fleet_view import ReplicaLoad, Tier, stable_hash
from deployments.routing.routing_counters import counters
from deployments.routing.short_key import short_key

from .fakes import FakeReplica, make_router, pending

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
NAMES = ["r0", "r1", "r2", "r3"]
ROWS = 64


@pytest.fixture
async def replicas():
    return [FakeReplica(name) for name in NAMES]


@pytest.fixture
async def router(replicas):
    made = make_router(AdapterRouter, replicas)
    for name in NAMES:
        made._view.report(name, ReplicaLoad(max_rows=ROWS))
    await asyncio.sleep(0.01)  # the probes of new replicas
    return made


async def choose(router, request):
    replica = await asyncio.wait_for(router._choose_replica_for_request(request), 2.0)
    return replica.replica_id.unique_id


def home(adapter):
    hashes = np.array([stable_hash(name) for name in NAMES], np.uint64)
    return NAMES[int(rendezvous_weights(short_key(adapter), hashes).argmax())]


def resident(router, replica, *adapters, **load):
    router._view.change(replica, Tier.RESIDENT, map(short_key, adapters), ())
    if load:
        router._view.report(replica, ReplicaLoad(max_rows=ROWS, **load))


def complete(router, replicas, name, request):
    """What Serve does when a request is over."""
    replica = next(replica for replica in replicas if replica.replica_id.unique_id == name)
    router.on_request_completed(replica.replica_id, request.metadata.internal_request_id)


async def test_an_adapter_goes_home_and_then_where_it_is_resident(router):
    before = counters.as_dict()
    assert await choose(router, pending(A)) == home(A)
    elsewhere = next(name for name in NAMES if name != home(B))
    resident(router, elsewhere, B)
    assert await choose(router, pending(B)) == elsewhere
    after = counters.as_dict()
    assert after[Reason.HOME] - before[Reason.HOME] == 1
    assert after[Reason.RESIDENT] - before[Reason.RESIDENT] == 1


async def test_requests_that_follow_a_cold_one_do_not_wait_for_news(router):
    before = counters.as_dict()
    assert {await choose(router, pending(A)) for _ in range(3)} == {home(A)}
    assert counters.as_dict()[Reason.LOADING] - before[Reason.LOADING] == 2


async def test_concurrent_calls_that_share_an_internal_request_id_all_get_a_replica(router):
    requests = [pending(A, "one-ingress-request") for _ in range(20)]
    requests += [pending("", "one-ingress-request") for _ in range(20)]
    names = await asyncio.gather(*(choose(router, request) for request in requests))
    assert set(names[:20]) == {home(A)}
    assert all(name in NAMES for name in names[20:])


async def test_each_concurrent_request_gets_the_replica_that_was_chosen_for_it(router):
    expected = {}
    for adapter, name in ((A, "r1"), (B, "r2"), (C, "r3")):
        resident(router, name, adapter)
        expected[adapter] = name
    adapters = [A, B, C] * 8
    names = await asyncio.gather(*(choose(router, pending(adapter)) for adapter in adapters))
    assert names == [expected[adapter] for adapter in adapters]


async def test_base_requests_of_one_tick_spread_over_the_replicas(router):
    names = await asyncio.gather(*(choose(router, pending()) for _ in range(8)))
    assert sorted(names) == sorted(NAMES * 2)


async def test_a_full_home_passes_the_request_on_at_once(router, replicas):
    full = next(r for r in replicas if r.replica_id.unique_id == home(A))
    full.queue_len = 10
    router.on_new_queue_len_info(full.replica_id, 10)
    assert await choose(router, pending(A)) != home(A)


async def test_a_warm_replica_that_only_looks_full_is_asked_and_used(router, replicas):
    warm = replicas[2]
    resident(router, "r2", A)
    router.on_new_queue_len_info(warm.replica_id, 10)  # stale: other routers' requests have finished since
    probes = warm.probes
    assert await choose(router, pending(A)) == "r2"
    assert warm.probes == probes + 1


async def test_a_replica_that_says_it_is_saturated_or_that_refused_is_passed_over(router):
    resident(router, "r2", A, saturated=True)
    first = await choose(router, pending(A))
    assert first != "r2"
    resident(router, "r1", B)
    assert await choose(router, pending(B, routing={"avoid": ("r1",)})) != "r1"


async def test_the_replica_is_told_why_it_was_chosen(router):
    resident(router, "r1", B)
    request = pending(B, routing={"avoid": ()})
    assert await choose(router, request) == "r1"
    assert request.kwargs["routing"]["reason"] == "resident"


async def test_full_replicas_are_not_polled_in_a_tight_loop(replicas):
    for replica in replicas:
        replica.queue_len = 10
    router = make_router(AdapterRouter, replicas)
    task = asyncio.create_task(choose(router, pending(A)))
    await asyncio.sleep(0.5)
    assert sum(replica.probes for replica in replicas) < 4 * 25
    replicas[3].queue_len = 0
    assert await asyncio.wait_for(task, 1.0) == "r3"


async def test_a_request_for_an_idle_replica_does_not_wait_behind_those_for_a_full_one(router, replicas):
    busy = next(r for r in replicas if r.replica_id.unique_id == home(A))
    busy.queue_len = 10
    router.on_new_queue_len_info(busy.replica_id, 10)
    for_the_busy = [asyncio.create_task(choose(router, pending(A))) for _ in range(30)]
    assert await asyncio.wait_for(choose(router, pending(B)), 0.2) in NAMES
    await asyncio.gather(*for_the_busy)


async def test_a_dead_replica_is_not_chosen_and_its_adapters_find_another(router, replicas):
    dead = next(r for r in replicas if r.replica_id.unique_id == home(A))
    resident(router, home(A), A)
    router.on_replica_actor_died(dead.replica_id)
    assert await choose(router, pending(A)) != home(A)


async def test_a_cancelled_request_leaves_nothing_behind(replicas):
    for replica in replicas:
        replica.queue_len = 10
    router = make_router(AdapterRouter, replicas)
    tasks = [asyncio.create_task(choose(router, pending(A))) for _ in range(5)]
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.1)
    assert not router._pending_requests_by_id and not router._reasons
    assert router.curr_num_routing_tasks == 0


async def test_a_request_counts_from_its_choice_until_it_is_complete(router, replicas):
    for name in NAMES:
        router._view.report(name, ReplicaLoad(max_rows=8))
    resident(router, "r0", A)
    requests = [pending(A) for _ in range(12)]
    names = [await choose(router, request) for request in requests]
    assert names[0] == "r0" and set(names) > {"r0"}, "a hot adapter spreads by what this router sent alone"
    assert router._view.demand(short_key(A)) == 12
    for name, request in zip(names, requests, strict=True):
        complete(router, replicas, name, request)
    assert router._view.demand(short_key(A)) == 0
    assert not router._sent
    complete(router, replicas, "r0", pending(A))  # a broadcast, which was never chosen for
    assert router._view.demand(short_key(A)) == 0


async def test_a_request_that_its_replica_refuses_counts_where_it_goes_next_alone(router, replicas):
    request = pending(A)
    first = await choose(router, request)
    complete(router, replicas, first, request)  # Serve says so of every attempt
    router.on_new_queue_len_info(next(r.replica_id for r in replicas if r.replica_id.unique_id == first), 10)
    next(r for r in replicas if r.replica_id.unique_id == first).queue_len = 10
    replica = await asyncio.wait_for(router._choose_replica_for_request(request, is_retry=True), 2.0)
    assert replica.replica_id.unique_id != first
    assert router._view.demand(short_key(A)) == 1


async def test_a_request_that_is_given_up_as_its_replica_is_chosen_counts_nowhere(router):
    request = pending(A)
    given_up = []
    request.future.add_done_callback(lambda _: given_up.append(task.cancel()))  # before it learns of its replica
    task = asyncio.create_task(router._choose_replica_for_request(request))
    await asyncio.gather(task, return_exceptions=True)
    assert given_up == [True]
    assert task.cancelled()
    assert router._view.demand(short_key(A)) == 0


async def test_a_router_without_any_news_sends_each_adapter_home_and_spreads_the_base_model(replicas):
    router = make_router(AdapterRouter, replicas)
    requests = {adapter: pending(adapter) for adapter in (A, B, C)}
    for adapter, request in requests.items():
        name = await choose(router, request)
        assert name == home(adapter)
        complete(router, replicas, name, request)
    assert {await choose(router, pending()) for _ in range(4)} == set(NAMES)


async def test_replicas_beyond_the_single_ranks_are_still_candidates():
    many = [FakeReplica(f"n{i}", queue_len=10) for i in range(20)]
    many[17].queue_len = 0
    router = make_router(AdapterRouter, many)
    assert await choose(router, pending(A)) == "n17"

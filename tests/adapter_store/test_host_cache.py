"""The host cache: least recently used first out, and never over its budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.host_cache import HostCache
from adapter_store.packed import PackedAdapter


def packed(key: int, elements: int) -> PackedAdapter:
    return PackedAdapter(f"a{key}", f"d{key}", 1, torch.full((elements,), float(key)))


@given(
    budget=st.integers(0, 120),
    history=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 16)), max_size=40),
)
def test_follows_a_simple_model(budget: int, history: list[tuple[bool, int, int]]) -> None:
    cache = HostCache(budget)
    model: OrderedDict[str, PackedAdapter] = OrderedDict()
    hits = misses = evictions = oversize = 0
    for put, key, elements in history:
        item = packed(key, elements)
        if put:
            cache.put(item)
            if item.nbytes > budget:
                oversize += 1
            else:
                model.pop(item.digest, None)
                while sum(entry.nbytes for entry in model.values()) + item.nbytes > budget:
                    model.popitem(last=False)
                    evictions += 1
                model[item.digest] = item
        else:
            assert cache.get(item.digest) is model.get(item.digest)
            hits += item.digest in model
            misses += item.digest not in model
            if item.digest in model:
                model.move_to_end(item.digest)
        stats = cache.stats()
        assert cache.digests() == tuple(model)
        assert stats.bytes == sum(entry.nbytes for entry in model.values()) <= budget
        assert (stats.hits, stats.misses, stats.evictions, stats.oversize) == (hits, misses, evictions, oversize)
        assert stats.adapters == len(model)


def test_an_adapter_in_use_outlives_its_eviction() -> None:
    cache = HostCache(64)
    cache.put(packed(1, 16))
    held = cache.get("d1")
    cache.put(packed(2, 16))
    assert cache.digests() == ("d2",)
    assert held is not None
    assert (held.slab == 1).all()


def test_the_budget_holds_at_every_moment_under_threads() -> None:
    cache = HostCache(1000)
    gate = threading.Barrier(9)
    worst: list[int] = []
    done = threading.Event()

    def work(seed: int) -> None:
        gate.wait()
        for step in range(300):
            key = (seed * 7 + step * 3) % 11
            found = cache.get(f"d{key}")
            if found is None:
                cache.put(packed(key, 10 * (key + 1)))
            else:
                assert (found.slab == key).all()

    def watch() -> None:
        gate.wait()
        while not done.is_set():
            worst.append(cache.stats().bytes)

    with ThreadPoolExecutor(9) as pool:
        watcher = pool.submit(watch)
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()
        done.set()
        watcher.result()
    assert max(worst) <= 1000
    stats = cache.stats()
    assert stats.hits + stats.misses == 8 * 300

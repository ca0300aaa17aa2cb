"""The host cache: what is referred to stays, what is held is whole, and never a byte over the budget."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_store.eviction import EVICTION_NAMES, eviction_policy
from adapter_store.host_cache import ROOM_ALIGNMENT, HostCache, Room
from adapter_store.packed import PackedAdapter

UNIT = ROOM_ALIGNMENT // 4  # elements
SIZES = (1, 1, 1, 2, 2, 3, 5, 4)  # units of each adapter that the machine below plays with
KEYS = st.integers(0, len(SIZES) - 1)


def fill(cache: HostCache, key: int, room: Room) -> PackedAdapter:
    slab = room.slab(room.nbytes // 4, torch.float32)
    slab.fill_(float(key + 1))
    return cache.keep(room, PackedAdapter(f"a{key}", f"d{key}", 1, slab, 0.1 * (key + 1)))


def put(cache: HostCache, key: int, elements: int) -> PackedAdapter | None:
    """The adapter with a reference, packed anew."""
    room = cache.reserve(elements * 4)
    return None if room is None else fill(cache, key, room)


class CacheMachine(RuleBasedStateMachine):
    """Random loads, failures, releases, removals against a model: which references there are."""

    @initialize(units=st.integers(1, 12), odd=st.integers(0, ROOM_ALIGNMENT - 1), name=st.sampled_from(EVICTION_NAMES))
    def start(self, units: int, odd: int, name: str) -> None:
        self.units = units
        self.cache = HostCache(units * ROOM_ALIGNMENT + odd, eviction=eviction_policy(name)())
        self.told: set[str] = set()
        self.cache.on_change = self.hear
        self.held: list[tuple[int, PackedAdapter]] = []
        self.rooms: list[tuple[int, Room]] = []

    def hear(self, digest: str, held: bool) -> None:
        assert (digest in self.told) != held, "nothing is told twice"
        self.told ^= {digest}

    def referenced(self) -> set[int]:
        return {key for key, _ in self.held}

    @rule(key=KEYS)
    def load(self, key: int) -> None:
        packed = self.cache.acquire(f"d{key}")
        if packed is None:
            room = self.cache.reserve(SIZES[key] * ROOM_ALIGNMENT)
            if room is None:
                assert self.rooms or self.held or SIZES[key] > self.units, (
                    "nothing is referred to, yet there is no room"
                )
                return
            packed = fill(self.cache, key, room)
        self.held.append((key, packed))

    @rule(key=KEYS)
    def begin(self, key: int) -> None:
        room = self.cache.reserve(SIZES[key] * ROOM_ALIGNMENT - 4)
        if room is not None:
            self.rooms.append((key, room))

    @precondition(lambda self: self.rooms)
    @rule(works=st.booleans())
    def end(self, works: bool) -> None:
        key, room = self.rooms.pop(0)
        if works:
            self.held.append((key, fill(self.cache, key, room)))
        else:
            self.cache.cancel(room)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        before = self.cache.releases
        key, packed = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.release(packed)
        assert (self.cache.releases > before) == (key not in self.referenced())

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        may = f"d{key}" in self.cache.digests() and key not in self.referenced()
        assert self.cache.remove(f"d{key}") == may
        if may:
            assert f"d{key}" not in self.cache.digests()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert set(self.cache.digests()) == {f"d{key}" for key in self.referenced()}

    @rule(key=KEYS, keys=st.sets(KEYS))
    def make_room_by_letting_go(self, key: int, keys: set[int]) -> None:
        """What ``holders`` names is enough, and of what may be let go only."""
        loose = {f"d{k}": sum(k == held for held, _ in self.held) for k in keys}
        named = self.cache.holders(SIZES[key] * ROOM_ALIGNMENT, loose)
        if named is None:
            assert self.cache.reserve(SIZES[key] * ROOM_ALIGNMENT) is None
            return
        assert set(named) <= {f"d{k}" for k in keys & self.referenced()}
        for held, packed in [entry for entry in self.held if entry[1].digest in named]:
            self.held.remove((held, packed))
            self.cache.release(packed)
        room = self.cache.reserve(SIZES[key] * ROOM_ALIGNMENT)
        assert room is not None
        self.rooms.append((key, room))

    @rule()
    def keep_a_line(self) -> None:
        self.cache.waited_only = True
        assert self.cache.reserve(1) is None
        room = self.cache.reserve(1, waited=True)
        if room is not None:
            self.cache.cancel(room)
        self.cache.waited_only = False

    @invariant()
    def what_is_referred_to_is_whole(self) -> None:
        for key, packed in self.held:
            assert (packed.slab == key + 1).all()
        assert {f"d{key}" for key in self.referenced()} <= set(self.cache.digests()) == self.told

    @invariant()
    def regions_cover_the_budget_without_overlap(self) -> None:
        regions = self.cache._regions
        assert [r.offset for r in regions[1:]] == [r.offset + r.nbytes for r in regions[:-1]]
        assert sum(r.nbytes for r in regions) == self.units * ROOM_ALIGNMENT <= self.cache.budget_bytes
        assert not any(a.free and b.free for a, b in pairwise(regions))
        stats = self.cache.stats()
        assert stats.bytes <= stats.budget_bytes
        assert stats.adapters == len(self.cache.digests())
        used = sum(SIZES[key] for key in self.referenced()) + sum(SIZES[key] for key, _ in self.rooms)
        assert stats.referenced_bytes == used * ROOM_ALIGNMENT


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_goes_first() -> None:
    cache = HostCache(3 * ROOM_ALIGNMENT)
    for key in range(3):
        packed = put(cache, key, UNIT)
        assert packed is not None
        cache.release(packed)
    again = cache.acquire("d0")
    assert again is not None
    cache.release(again)
    put(cache, 3, UNIT)
    assert set(cache.digests()) == {"d0", "d2", "d3"}
    assert (cache.stats().hits, cache.stats().misses, cache.stats().evictions) == (1, 4, 1)


def test_a_large_one_takes_neighbours_and_of_those_the_oldest() -> None:
    cache = HostCache(6 * ROOM_ALIGNMENT)
    for key in (0, 1, 2, 3, 4, 5):
        packed = put(cache, key, UNIT)
        assert packed is not None
        cache.release(packed)
    for key in (0, 1):  # used again: now 2 and 3 are the oldest neighbours
        packed = cache.acquire(f"d{key}")
        assert packed is not None
        cache.release(packed)
    assert put(cache, 6, 2 * UNIT) is not None
    assert set(cache.digests()) == {"d0", "d1", "d4", "d5", "d6"}


def test_two_loads_of_the_same_content_hold_it_once() -> None:
    cache = HostCache(4 * ROOM_ALIGNMENT)
    rooms = [cache.reserve(ROOM_ALIGNMENT) for _ in range(2)]
    first, second = (fill(cache, 0, room) for room in rooms if room is not None)
    assert first is second
    assert cache.stats().bytes == ROOM_ALIGNMENT
    cache.release(first)
    assert not cache.remove("d0")
    cache.release(second)
    assert cache.remove("d0")


def test_threads_in_inference_mode_and_not_fill_it_alike() -> None:
    with torch.inference_mode():
        cache = HostCache(4 * ROOM_ALIGNMENT)
        put(cache, 0, UNIT)
    with ThreadPoolExecutor(1) as pool:
        packed = pool.submit(put, cache, 1, UNIT).result()
    assert packed is not None
    assert (packed.slab == 2).all()


def test_the_budget_holds_at_every_moment_under_threads() -> None:
    cache = HostCache(16 * ROOM_ALIGNMENT + 8)
    gate = threading.Barrier(9)
    worst: list[int] = []
    refused: list[int] = []
    done = threading.Event()

    def work(seed: int) -> None:
        gate.wait()
        for step in range(300):
            key = (seed * 7 + step * 3) % 11
            found = cache.acquire(f"d{key}") or put(cache, key, UNIT * (1 + key % 3))
            if found is not None:
                assert (found.slab == key + 1).all()
                cache.release(found)
            else:
                refused.append(step)

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
    assert max(worst) <= cache.budget_bytes
    stats = cache.stats()
    assert stats.hits + stats.misses + len(refused) == 8 * 300
    assert stats.referenced_bytes == 0


def test_more_memory_than_there_is_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"host_cache_bytes is \d+ but.*lower it"):
        HostCache(1 << 62)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_it_holds_is_page_locked_until_it_is_closed() -> None:
    cache = HostCache(100 << 20, pin_memory=True)  # no power of two
    packed = put(cache, 0, 1 << 20)
    assert packed is not None
    assert packed.slab.is_pinned()
    copy = packed.slab.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert (copy == 1).all()
    cache.release(packed)
    cache.close()
    assert not packed.slab.is_pinned()

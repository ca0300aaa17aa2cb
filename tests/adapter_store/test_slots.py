"""The slot pool: against a simple model of it by drawn histories, and its order of memory operations on a GPU."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_store.errors import PinRefused
from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule
from adapter_store.packed import PackedAdapter
from adapter_store.slots import SLOT_ALIGNMENT, Residency, Slot, SlotPool
from kernels.lora_group import packed_rank

LAYOUT = AdapterLayout(
    "",
    2,
    (
        TargetGroup("qkv", tuple(TargetModule(f"{name}_proj", 6, out) for name, out in (("q", 8), ("k", 4), ("v", 4)))),
        TargetGroup("o", (TargetModule("o_proj", 8, 6),)),
    ),
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def adapter(key: int, rank: int, layout: AdapterLayout = LAYOUT, pin: bool = False) -> PackedAdapter:
    """An adapter whose every element tells which one it is."""
    digest = hashlib.sha256(f"{key}/{rank}".encode()).hexdigest()
    slab = torch.full((layout.slab_elements(rank),), float(key + 1), pin_memory=pin)
    return PackedAdapter(f"a{key}", digest, rank, slab)


def content(pool: SlotPool, slot: Slot, rank: int) -> torch.Tensor:
    pool.wait(slot)
    offset, table_rank = pool.slot_table[slot.index].tolist()
    assert table_rank == packed_rank(rank)
    return pool.arena[offset : offset + LAYOUT.slab_elements(rank)].cpu().clone()


RANKS = (1, 2, 3, 4, 5, 8, 2, 4)  # of the adapters that the machine below plays with
KEYS = st.integers(0, len(RANKS) - 1)


class PoolMachine(RuleBasedStateMachine):
    """Random acquire, load, release, want, pin, remove and clear against a model that is a list and a few dicts."""

    @initialize(
        classes=st.dictionaries(st.sampled_from([2, 4, 8]), st.integers(1, 2), min_size=1), poison=st.booleans()
    )
    def start(self, classes: dict[int, int], poison: bool) -> None:
        self.classes, self.poison = classes, poison
        self.news: list[Residency] = []
        self.pool = SlotPool(LAYOUT, classes, torch.float32, "cpu", poison=poison, on_change=self.news.append)
        self.order: list[str] = []  # least recently used first
        self.where: dict[str, int] = {}  # digest -> rank class of its slot
        self.adapters: dict[str, PackedAdapter] = {}
        self.loaded: set[str] = set()
        self.held: list[tuple[Slot, str]] = []
        self.hits = self.misses = self.evictions = self.exhausted = 0
        self.copied: list[PackedAdapter] = []
        self.wanted: list[str] = []
        self.pinned: set[str] = set()

    def refs(self, digest: str) -> int:
        return sum(held == digest for _, held in self.held)

    def use(self, digest: str) -> None:
        if digest in self.order:
            self.order.remove(digest)
        self.order.append(digest)

    def class_to_give(self, rank: int, spare: bool) -> tuple[int, str | None] | None:
        """The class a new adapter goes to and whom it puts out, by the documented order of preference."""
        fitting = sorted(c for c in self.classes if c >= rank)
        for c in fitting:
            if list(self.where.values()).count(c) < self.classes[c]:
                return c, None
        may_go = [d for d in self.order if self.where[d] >= rank and not self.refs(d) and d not in self.pinned]
        for c in fitting:
            for digest in may_go:
                if self.where[digest] == c and digest not in self.wanted:
                    return c, digest
        for digest in reversed(self.wanted):
            if digest in may_go and not spare:
                return self.where[digest], digest
        return None

    def expect_acquire(self, packed: PackedAdapter, spare: bool) -> bool:
        digest = packed.digest
        if digest in self.where:
            self.use(digest)
            return True
        choice = self.class_to_give(packed.rank, spare)
        if choice is None:
            self.exhausted += 1
            return False
        self.misses += 1
        if choice[1] is not None:
            self.evictions += 1
            self.order.remove(choice[1])
            del self.where[choice[1]]
            self.loaded.discard(choice[1])
        self.where[digest] = choice[0]
        self.use(digest)
        return True

    @rule(key=KEYS, load=st.booleans(), spare=st.booleans())
    def acquire(self, key: int, load: bool, spare: bool) -> None:
        packed = adapter(key, RANKS[key])
        if packed.rank > max(self.classes):
            with pytest.raises(ValueError, match=f"rank {packed.rank}"):
                self.pool.acquire(packed.digest, packed.rank)
            return
        self.hits += packed.digest in self.where
        given = self.expect_acquire(packed, spare)
        slot = self.pool.acquire(packed.digest, packed.rank, spare=spare)
        assert (slot is not None) == given
        if slot is not None:
            self.take(slot, packed, load)

    def take(self, slot: Slot, packed: PackedAdapter, load: bool) -> None:
        assert slot.digest == packed.digest
        assert slot.class_rank == self.where[packed.digest]
        self.adapters[packed.digest] = packed
        self.held.append((slot, packed.digest))
        assert slot.loaded == (packed.digest in self.loaded)
        if load and not slot.loaded:
            self.pool.load(slot, packed)
            self.copied.append(packed)
            self.loaded.add(packed.digest)
        assert self.pool.ready(slot) == slot.loaded

    @rule(keys=st.lists(KEYS, min_size=1, max_size=8))
    def serve_one_after_another(self, keys: list[int]) -> None:
        """Leaves the pool full of adapters that nobody uses: what eviction chooses from."""
        for key in keys:
            held = len(self.held)
            self.acquire(key, load=True, spare=False)
            if len(self.held) > held:
                self.let_go(-1)

    @rule(key=KEYS)
    def acquire_only_if_resident(self, key: int) -> None:
        packed = adapter(key, RANKS[key])
        slot = self.pool.acquire(packed.digest)
        assert (slot is not None) == (packed.digest in self.where)
        if slot is not None:
            self.hits += 1
            self.use(packed.digest)
            self.take(slot, packed, load=False)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.let_go(data.draw(st.integers(0, len(self.held) - 1)))

    def let_go(self, position: int) -> None:
        slot, digest = self.held.pop(position)
        self.pool.step_done()
        self.pool.release(slot)
        self.use(digest)
        if self.refs(digest) == 0 and digest not in self.loaded:
            self.forget(digest)

    @rule(keys=st.lists(KEYS, max_size=4))
    def want(self, keys: list[int]) -> None:
        self.wanted = list(dict.fromkeys(adapter(key, RANKS[key]).digest for key in keys))
        self.pool.want([adapter(key, RANKS[key]).digest for key in keys])

    @rule(key=KEYS)
    def pin_or_unpin(self, key: int) -> None:
        digest = adapter(key, RANKS[key]).digest
        slot = self.pool.find(digest)
        largest = max(self.classes)
        if digest in self.pinned:
            assert self.pool.unpin(digest)
            self.pinned.remove(digest)
        elif slot is None:
            assert not self.pool.unpin(digest)
        elif self.where[digest] == largest and (
            sum(self.where[d] == largest for d in self.pinned) == self.classes[largest] - 1
        ):
            with pytest.raises(PinRefused, match="must stay for other adapters"):
                self.pool.pin(slot)
        else:
            self.pool.pin(slot)
            self.pinned.add(digest)
        assert set(self.pool.pinned) == self.pinned

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        digest = adapter(key, RANKS[key]).digest
        may = digest in self.where and not self.refs(digest)
        assert self.pool.remove(digest) == may
        if may:
            self.forget(digest)

    def forget(self, digest: str) -> None:
        self.order.remove(digest)
        del self.where[digest]
        self.loaded.discard(digest)
        self.pinned.discard(digest)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        for digest in [d for d in self.order if self.refs(d) == 0]:
            self.forget(digest)

    @invariant()
    def memory_holds_what_the_table_says(self) -> None:
        arena, table = self.pool.arena, self.pool.slot_table
        used = torch.zeros(arena.numel(), dtype=torch.bool)
        rows = {}
        for digest in self.where:
            slot = self.pool.find(digest)
            assert slot is not None
            rows[slot.index] = digest
            assert slot.offset % SLOT_ALIGNMENT == 0
        assert len(rows) == len(self.where)  # no two adapters in one slot
        for index, (offset, rank) in enumerate(table.tolist()):
            digest = rows.get(index)
            if digest is None or digest not in self.loaded:
                assert rank == 0
                continue
            packed = self.adapters[digest]
            assert rank == packed_rank(packed.rank)
            region = slice(offset, offset + packed.slab.numel())
            assert not used[region].any()
            used[region] = True
            assert torch.equal(arena[region], packed.slab)
        if self.poison:
            assert arena[~used].isnan().all()

    @invariant()
    def references_are_kept(self) -> None:
        for slot, digest in self.held:
            assert slot.digest == digest
            assert slot.refs == self.refs(digest) > 0
            assert self.pool.find(digest) is slot

    @invariant()
    def slots_that_can_be_given_are_counted(self) -> None:
        kept = [self.where[digest] for digest in self.where if self.refs(digest) or digest in self.pinned]
        assert self.pool.available() == {c: count - kept.count(c) for c, count in self.classes.items()}

    @invariant()
    def news_and_counters_agree(self) -> None:
        residency = self.pool.residency()
        if self.loaded == self.where.keys():
            taken = list(self.where.values())
            assert dict(residency.free) == {c: count - taken.count(c) for c, count in self.classes.items()}
        assert dict(residency.adapters) == {d: self.adapters[d].rank for d in self.loaded}
        assert [news.version for news in self.news] == list(range(1, len(self.news) + 1))
        assert residency == (self.news[-1] if self.news else residency)
        stats = self.pool.stats()
        counted = (stats.hits, stats.misses, stats.evictions, stats.exhausted)
        assert counted == (self.hits, self.misses, self.evictions, self.exhausted)
        assert stats.bytes == sum(self.adapters[digest].nbytes for digest in self.loaded) <= stats.capacity_bytes
        assert (stats.copies.done, stats.copies.bytes) == (len(self.copied), sum(p.nbytes for p in self.copied))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_what_was_released_last_goes_last_and_what_is_wanted_after_it() -> None:
    pool = SlotPool(LAYOUT, {4: 3}, torch.float32, "cpu")
    slots = {name: pool.acquire(name, 4) for name in "abc"}
    for name, slot in slots.items():
        assert slot is not None
        pool.load(slot, PackedAdapter(name, name, 4, torch.zeros(LAYOUT.slab_elements(4))))
    for name in "bac":
        slot = slots[name]
        assert slot is not None
        pool.release(slot)
    pool.want("cbx")
    for number, gone in enumerate("abc"):
        assert pool.find(gone) is not None
        assert pool.acquire(str(number), 4) is not None
        assert pool.find(gone) is None


def test_what_the_queue_wants_next_is_not_put_out_for_what_it_wants_now(device: str) -> None:
    pool = SlotPool(LAYOUT, {4: 2}, torch.float32, device, poison=True)
    old, warm, cold = adapter(0, 4), adapter(1, 4), adapter(2, 4)
    for packed in (warm, old):
        slot = pool.acquire(packed.digest, 4)
        assert slot is not None
        pool.load(slot, packed)
        pool.release(slot)
    # warm is the least recently used, yet the batch that brings cold also wants warm.
    pool.want([cold.digest, warm.digest])
    assert pool.acquire(cold.digest, 4) is not None
    assert pool.find(warm.digest) is not None
    assert pool.find(old.digest) is None
    assert pool.acquire(adapter(3, 4).digest, 4, spare=True) is None
    assert pool.find(warm.digest) is not None


def test_copies_are_counted_with_their_bytes_and_their_time(device: str) -> None:
    pool = SlotPool(LAYOUT, {4: 2, 8: 1}, torch.float32, device)
    packed = [adapter(number, rank) for number, rank in enumerate((4, 3, 7))]
    assert (pool.stats().bytes, pool.stats().copies.done) == (0, 0)
    for one in packed:
        slot = pool.acquire(one.digest, one.rank)
        assert slot is not None
        pool.load(slot, one)
    if device == "cuda":
        torch.cuda.synchronize()
    assert pool.settle() == 0
    stats, total = pool.stats(), sum(one.nbytes for one in packed)
    assert (stats.bytes, stats.capacity_bytes) == (total, pool.arena.nbytes)
    assert (stats.copies.done, stats.copies.failed, stats.copies.bytes) == (3, 0, total)
    assert stats.copies.seconds > 0


def test_reload_is_bit_identical_in_another_slot(device: str) -> None:
    pool = SlotPool(LAYOUT, {4: 2, 8: 1}, torch.float32, device, poison=True)
    packed = PackedAdapter("x", "x", 3, torch.randn(LAYOUT.slab_elements(3)))
    first = pool.acquire("x", 3)
    assert first is not None
    pool.load(first, packed)
    before = content(pool, first, 3)
    pool.release(first)
    others = [pool.acquire(str(number), 4) for number in range(3)]
    assert pool.find("x") is None
    assert others[1] is not None  # the one in the larger class
    pool.release(others[1])
    again = pool.acquire("x", 3)
    assert again is not None and again.index != first.index
    pool.load(again, packed)
    assert torch.equal(content(pool, again, 3), before)


@pytest.mark.parametrize("classes", [{}, {0: 4}, {8: 0}, {-1: 2}])
def test_classes_that_make_no_pool(classes: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="slots is"):
        SlotPool(LAYOUT, classes, torch.float32, "cpu")


def test_a_failed_load_leaves_nothing_behind(device: str) -> None:
    pool = SlotPool(LAYOUT, {4: 1}, torch.float32, device)
    slot = pool.acquire("never loaded", 4)
    assert slot is not None and not pool.ready(slot)
    pool.release(slot)
    assert pool.find("never loaded") is None
    assert pool.residency().free == {4: 1}


# A slot large enough that its copy takes milliseconds: what is out of order then shows.
LARGE = AdapterLayout("", 16, (TargetGroup("o", (TargetModule("o_proj", 16_384, 16_384),)),))


def slow_kernel(milliseconds: int = 50) -> None:
    """Keep the current stream busy for about that long."""
    torch.cuda._sleep(2_000_000 * milliseconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOrderOnCuda:
    def start(self) -> tuple[SlotPool, Slot, PackedAdapter]:
        """A pool of one slot, assigned but not loaded, and nothing running on the device."""
        pool = SlotPool(LARGE, {16: 1}, torch.float32, "cuda", poison=True)
        packed = adapter(0, 16, LARGE, pin=True)
        slot = pool.acquire(packed.digest, 16)
        assert slot is not None
        torch.cuda.synchronize()
        return pool, slot, packed

    def test_reuse_waits_for_the_last_step_that_reads(self) -> None:
        pool, slot, old = self.start()
        new = adapter(1, 16, LARGE, pin=True)
        pool.load(slot, old)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            slow_kernel()
            read_by_step = pool.arena.clone()  # the step reads the slot long after it was launched
            row_by_step = pool.slot_table.clone()
            pool.step_done()
        pool.release(slot)
        reused = pool.acquire(new.digest, 16)
        assert reused is not None
        assert reused is slot
        pool.load(reused, new)
        assert not pool.ready(reused)  # it cannot be: the step is still to come
        torch.cuda.synchronize()
        assert pool.ready(reused)
        assert (read_by_step[: old.slab.numel()] == 1).all()
        assert row_by_step.tolist() == [[0, 16]]
        assert (pool.arena[: new.slab.numel()] == 2).all()

    def test_a_slab_may_be_let_go_before_it_is_copied(self) -> None:
        pool, slot, old = self.start()
        pool.load(slot, old)
        with torch.cuda.stream(torch.cuda.Stream()):
            slow_kernel(1000)  # pinned memory takes the host tens of milliseconds to get
            pool.step_done()
        pool.release(slot)
        new = adapter(1, 16, LARGE, pin=True)
        count = new.slab.numel()
        assert pool.acquire(new.digest, 16) is slot
        pool.load(slot, new)
        del new  # the copy waits for the step; meanwhile others ask for pinned memory and write to it
        others = [adapter(2 + i, 16, LARGE, pin=True) for i in range(3)]
        assert not pool.ready(slot)
        torch.cuda.synchronize()
        assert (pool.arena[:count] == 2).all()
        assert len(others) == 3

    def test_host_memory_is_let_go_when_the_copy_has_read_it(self) -> None:
        pool, slot, old = self.start()
        let_go: list[str] = []
        pool.load(slot, old, lambda: let_go.append("old"))
        torch.cuda.synchronize()
        assert (pool.settle(), let_go) == (0, ["old"])
        with torch.cuda.stream(torch.cuda.Stream()):
            slow_kernel()
            pool.step_done()
        pool.release(slot)
        new = adapter(1, 16, LARGE, pin=True)
        reused = pool.acquire(new.digest, 16)
        assert reused is not None
        pool.load(reused, new, lambda: let_go.append("new"))
        assert (pool.settle(), let_go) == (1, ["old"])  # the copy waits for the step, nobody waits for the copy
        torch.cuda.synchronize()
        assert (pool.settle(), let_go) == (0, ["old", "new"])

    def test_the_time_of_a_copy_is_its_own(self) -> None:
        pool, slot, old = self.start()
        pool.load(slot, old)
        with torch.cuda.stream(torch.cuda.Stream()):
            slow_kernel(1000)
            pool.step_done()
        pool.release(slot)
        new = adapter(1, 16, LARGE, pin=True)
        assert pool.acquire(new.digest, 16) is slot
        pool.load(slot, new)  # waits for the step, which is not the copy's time
        torch.cuda.synchronize()
        assert pool.settle() == 0
        copies = pool.stats().copies
        assert (copies.done, copies.bytes) == (2, old.nbytes + new.nbytes)
        assert 0 < copies.seconds < 0.2

    def test_a_load_waits_for_nobody_else(self) -> None:
        pool, slot, packed = self.start()
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            slow_kernel()
            running_step = torch.cuda.Event()
            running_step.record(stream)
        pool.load(slot, packed)
        assert not running_step.query()  # the host came here while the step was still running
        while not pool.ready(slot):
            assert not running_step.query()  # and the copy runs beside the step, not behind it
        assert (pool.arena[: packed.slab.numel()] == 1).all()

    def test_a_step_behind_wait_sees_the_whole_adapter(self) -> None:
        pool, slot, packed = self.start()
        pool.load(slot, packed)
        with torch.cuda.stream(torch.cuda.Stream()):
            pool.wait(slot)
            seen, row = pool.arena.clone(), pool.slot_table.clone()
        torch.cuda.synchronize()
        assert (seen[: packed.slab.numel()] == 1).all()
        assert row.tolist() == [[0, 16]]

    def test_the_table_row_comes_after_the_copy(self) -> None:
        pool, slot, packed = self.start()
        pool.load(slot, packed)
        for _ in range(1000):
            row = pool.slot_table[0, 1].item()  # read before the arena is
            first, last = pool.arena[0].item(), pool.arena[packed.slab.numel() - 1].item()
            if row:
                assert (row, first, last) == (16, 1.0, 1.0)
                break
            assert first == 1.0 or math.isnan(first)
        else:
            pytest.fail("the row never came")

"""Adapters that are fetched ahead, pinned and unloaded on the running engine, without or beside requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from adapter_store.errors import AdapterNotFound, PinRefused
from adapter_store.packed import PackedAdapter
from adapter_store.slot_copies import CopyUnderWay, SlotCopies
from engine.request import EngineDead
from tests.engine.engines import answer, answers, ask, assert_same, expected, running, settings_for
from tests.engine.oracle import ATTENTION, TinyAdapter, TinyModel, build_tiny_model
from tests.engine.served import prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def adapters(model: TinyModel) -> list[TinyAdapter]:
    return [model.adapter(f"tenant-{seed}", 8, ATTENTION, seed=seed) for seed in range(4)]


async def test_a_prefetched_adapter_is_resident_before_it_is_asked_for(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    async with running(settings_for(model, adapters)) as engine:
        assert await engine.prefetch("llama-tenant-0")
        (digest,) = engine.stats().resident
        assert await engine.prefetch("llama-tenant-0", digest)
        got = await answer(engine, ask("x", [5, 6], adapters[0], digest=digest, logprobs=0))
        assert_same(got, expected(model, [5, 6], adapters[0], 8))
        assert (engine.stats().slot_hits, engine.stats().slot_misses) == (1, 1)
        with pytest.raises(AdapterNotFound, match="nobody"):
            await engine.prefetch("nobody")


async def test_a_prefetch_puts_out_nothing_in_use(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, slots={16: 1})) as engine:
        stream = engine.generate(ask("x", [5], adapters[0], new=200))
        await anext(stream)
        assert not await engine.prefetch("llama-tenant-1")
        assert len(engine.stats().host_cached) == 2
        await stream.aclose()
        assert await engine.prefetch("llama-tenant-1")


async def test_a_pinned_adapter_stays_and_an_unpinned_one_goes(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, slots={16: 2})) as engine:
        await engine.prefetch("llama-tenant-0")
        (digest,) = engine.stats().resident
        await engine.pin(digest)
        for turn in range(2):
            for tenant in adapters[1:]:
                got = await answer(engine, ask(f"{turn}", [5, 6], tenant, logprobs=0))
                assert_same(got, expected(model, [5, 6], tenant, 8))
                assert digest in engine.stats().resident
        assert await engine.unpin(digest)
        assert not await engine.unpin(digest)
        await answers(engine, [ask(tenant.name, [5], tenant) for tenant in adapters[1:3]])
        assert digest not in engine.stats().resident


async def test_pinning_more_than_fits_is_refused(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, slots={8: 1, 16: 1})) as engine:
        with pytest.raises(AdapterNotFound, match="prefetch it first"):
            await engine.pin("0" * 64)
        for name in ("llama-tenant-0", "llama-tenant-1"):
            await engine.prefetch(name)
        first, second = engine.stats().resident
        await engine.pin(first)
        await engine.pin(first)
        with pytest.raises(PinRefused, match=r"1 of 2 slots are pinned.*unpin one"):
            await engine.pin(second)
        got = await answer(engine, ask("x", [5], adapters[2], logprobs=0))
        assert_same(got, expected(model, [5], adapters[2], 8))


async def test_a_pin_waits_for_a_slot_in_use(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, slots={8: 1, 16: 1})) as engine:
        streams = [engine.generate(ask(tenant.name, [5], tenant, new=200)) for tenant in adapters[:2]]
        for stream in streams:
            await anext(stream)
        busy = set(engine.stats().resident)
        assert not await engine.prefetch("llama-tenant-2")
        (digest,) = set(engine.stats().host_cached) - busy
        pin = asyncio.create_task(engine.pin(digest))
        await answer(engine, ask("beside", [5]))
        assert not pin.done()
        await streams[0].aclose()
        await pin
        assert digest in engine.stats().resident
        await streams[1].aclose()


async def test_unload_waits_for_requests_and_frees_everything(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters, poison=True)) as engine:
        stream = engine.generate(ask("x", prompt(12, seed=1), adapters[0], new=60))
        await anext(stream)
        (digest,) = engine.stats().resident
        await engine.pin(digest)
        assert not await engine.unload(digest)
        assert not await engine.unload(digest, 0.01)
        unload = asyncio.create_task(engine.unload(digest, 60.0))
        async for chunk in stream:
            assert not unload.done() or chunk.finish_reason is not None
        assert await unload
        stats = engine.stats()
        assert (stats.resident, stats.host_cached) == ((), ())
        assert not engine.parts.pages._kept
        assert engine.parts.slots is not None
        assert engine.parts.slots.pinned == ()
        before = stats.reused_tokens
        got = await answer(engine, ask("x", prompt(12, seed=1), adapters[0], logprobs=0))
        assert_same(got, expected(model, prompt(12, seed=1), adapters[0], 8))
        assert engine.stats().reused_tokens == before
        assert await engine.unload("0" * 64), "nothing to free is as good as freed"


async def test_unload_leaves_the_pages_of_others(model: TinyModel, adapters: list[TinyAdapter]) -> None:
    async with running(settings_for(model, adapters)) as engine:
        await answer(engine, ask("x", prompt(12, seed=1), adapters[0]))
        (digest,) = engine.stats().resident
        for tenant in (adapters[1], None):
            await answer(engine, ask("x", prompt(12, seed=1), tenant))
        assert await engine.unload(digest)
        for tenant, reused in ((adapters[0], 0), (adapters[1], 8), (None, 8)):
            before = engine.stats().reused_tokens
            await answer(engine, ask("x", prompt(12, seed=1), tenant))
            assert engine.stats().reused_tokens - before == reused


async def test_questions_that_are_open_when_the_engine_closes_end(
    model: TinyModel, adapters: list[TinyAdapter]
) -> None:
    async with running(settings_for(model, adapters, slots={16: 1})) as engine:
        stream = engine.generate(ask("x", [5], adapters[0], new=200))
        await anext(stream)
        (digest,) = engine.stats().resident
        unload = asyncio.create_task(engine.unload(digest, 60.0))
        await asyncio.sleep(0)
        reader = asyncio.create_task(anext(stream))
        await engine.close()
        with pytest.raises(EngineDead, match="closed"):
            await unload
        await asyncio.gather(reader, return_exceptions=True)
        with pytest.raises(EngineDead):
            await engine.prefetch("llama-tenant-0")


class _Later:
    """In the place of a CUDA event: of a copy that takes as long."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def query(self) -> bool:
        return time.monotonic() >= self._at

    def elapsed_time(self, later: _Later) -> float:
        assert later.query(), "only what has happened tells its time"
        return (later._at - self._at) * 1000


async def test_an_unload_that_waits_for_a_copy_alone_is_answered_at_its_end(
    model: TinyModel, adapters: list[TinyAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs and nobody asks anything else meanwhile."""
    start = SlotCopies.start

    def slow(self: SlotCopies, packed: PackedAdapter, writes: Any, *, done: Callable[[], None], **_: object) -> None:
        start(self, packed, writes)
        begun, through = cast(Any, _Later(0)), cast(Any, _Later(0.3))
        self._under_way.append(CopyUnderWay(begun, through, packed, done))

    monkeypatch.setattr(SlotCopies, "start", slow)
    async with running(settings_for(model, adapters)) as engine:
        assert await engine.prefetch("llama-tenant-0")
        (digest,) = engine.stats().resident
        assert engine.stats().host_referenced_bytes > 0
        assert await engine.unload(digest, wait_s=10)
        assert engine.stats().resident == engine.stats().host_cached == ()
        assert engine.parts.slots is not None
        assert engine.parts.slots.stats().copies.seconds >= 0.3

"""What the step loop counts is what happened: values in their buckets, gaps between tokens, a request's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.histogram import Histogram
from engine.request import GenerationChunk, Timings
from tests.engine.engines import answer, ask, running, settings_for
from tests.engine.oracle import TinyModel

MakeModel = Callable[..., TinyModel]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5))))
def test_a_histogram_counts_each_value_in_its_bucket_and_their_sum(seen):
    bounds = (0.5, 1.0, 4.0)
    histogram = Histogram(bounds)
    for value, times in seen:
        histogram.observe(value, times)
    read = histogram.read()
    for bound, upto in zip(bounds, range(1, 4), strict=True):  # Prometheus's le: at most
        assert sum(read.counts[:upto]) == sum(times for value, times in seen if value <= bound)
    assert read.count == sum(times for _, times in seen)
    assert read.total == pytest.approx(sum(value * times for value, times in seen))


async def test_a_batch_is_counted_token_by_token_and_its_times_add_up(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    adapter = model.adapter("one", 8, seed=5)
    lengths = (1, 2, 20, 25)
    async with running(settings_for(model, [adapter], num_pages=12)) as engine:  # too few pages: rows are preempted

        async def one(length: int) -> tuple[Timings, float]:
            started = time.monotonic()
            request = ask(f"r{length}", range(1, 12), adapter, new=length)
            chunks: list[GenerationChunk] = [chunk async for chunk in engine.generate(request)]
            assert all(chunk.timings is None for chunk in chunks[:-1]) and chunks[-1].timings is not None
            return chunks[-1].timings, time.monotonic() - started

        told = await asyncio.gather(*map(one, lengths))
        meter, stats = engine.meter, engine.stats()

    for spent, took in told:
        parts = (spent.adapter_s, spent.queue_s, spent.prefill_s, spent.decode_s)
        assert min(parts) >= 0 and 0 < sum(parts) <= took
    assert stats.preemptions > 0
    assert meter.inter_token_seconds.read().count == sum(lengths) - len(lengths)
    assert meter.inter_token_seconds.read().total == pytest.approx(sum(spent.decode_s for spent, _ in told))
    for histogram, name in (
        (meter.adapter_seconds, "adapter_s"),
        (meter.queue_seconds, "queue_s"),
        (meter.prefill_seconds, "prefill_s"),
    ):
        assert histogram.read().count == len(lengths)
        assert histogram.read().total == pytest.approx(sum(getattr(spent, name) for spent, _ in told))
    rows = meter.step_rows.read()
    assert rows.count == stats.steps >= max(lengths) and rows.total >= sum(lengths)
    assert stats.generated_tokens == sum(lengths)


async def test_a_pause_is_no_step(tiny_model: MakeModel) -> None:
    async with running(settings_for(tiny_model("llama"))) as engine:
        for request_id in ("first", "second"):
            await answer(engine, ask(request_id, (1, 2), new=3))
            await asyncio.sleep(0.01)
        assert engine.meter.step_seconds.read().count == engine.stats().steps - 2


async def test_an_aborted_request_says_where_its_time_went(tiny_model: MakeModel) -> None:
    async with running(settings_for(tiny_model("llama"))) as engine:
        request = ask("r", (1, 2), new=50)
        async for chunk in engine.generate(request):
            engine.abort(request.request_id)
            last = chunk
        assert last.finish_reason == "abort" and last.timings is not None and last.timings.decode_s > 0
        assert GenerationChunk.from_dict(last.to_dict()) == last

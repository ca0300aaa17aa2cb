"""Many adapters through few slots and little host memory, under random traffic, aborts, failures, pins and unloads."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest

from adapter_store.errors import AdapterError, PinRefused
from engine.request import EngineOverloaded
from tests.engine.modelless import Adapters, ModellessEngine

COUNT = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("churn"), COUNT)


class Storm:
    """Draws events, applies them, and knows what each request must come to."""

    def __init__(self, engine: ModellessEngine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng
        self.events = 0
        self.aborted: set[str] = set()
        self.answers: list[Future[Any]] = []

    def name(self) -> str:
        """Zipf 1.0 over the adapters."""
        return f"a{self.rng.choices(range(COUNT), [1 / (1 + n) for n in range(COUNT)])[0]}"

    def event(self) -> None:
        self.events += 1
        engine, rng = self.engine, self.rng
        draw = rng.random()
        if draw < 0.42:
            adapter = rng.choices([self.name(), None, "bad", "nobody"], [20, 2, 1, 1])[0]
            prompt, new = rng.choice((1, 3, 9, 20)), rng.randint(1, 8)
            tenant = rng.choice(("", "", "hot", "cold"))
            try:
                engine.ask(adapter, prompt, new, tenant=tenant, resolved=rng.random() < 0.8)
            except EngineOverloaded:
                engine.turn()
        elif draw < 0.47 and engine.unfinished:
            leaving = rng.choice(engine.unfinished)
            self.aborted.add(leaving.request.request_id)
            engine.loop.leave(leaving)
        elif draw < 0.54:
            self.question()
        else:
            for _ in range(rng.randint(1, 4)):
                if engine.unfinished:
                    engine.turn()

    def question(self) -> None:
        name = self.name()
        digest = self.engine.adapters.digest(name)
        kind = self.rng.randrange(5)
        put = (
            lambda residents, done: residents.prefetch(name, digest, done),
            lambda residents, done: residents.pin(digest, done),
            lambda residents, done: residents.unpin(digest, done),
            lambda residents, done: residents.unload(digest, done, wait=True),
            lambda residents, done: residents.unload(digest, done, wait=False),
        )[kind]
        answer = self.engine.question(put)
        self.answers.append(answer)
        if kind == 1 and self.rng.random() < 0.7:  # most pins are undone soon
            self.answers.append(self.engine.question(lambda residents, done: residents.unpin(digest, done)))

    async def ends(self) -> Counter[str]:
        """Check what each request came to, and count it."""
        self.engine.drain()
        await asyncio.sleep(0)
        ends: Counter[str] = Counter()
        for sequence in self.engine.sequences:
            request, queue = sequence.request, sequence.queue
            assert queue is not None
            try:
                chunk = await asyncio.wait_for(queue.get(), 5)
            except AdapterError:
                assert request.adapter in ("bad", "nobody")
                ends["refused"] += 1
                continue
            ends[chunk.finish_reason or "none"] += 1
            if chunk.finish_reason == "abort":
                assert request.request_id in self.aborted
            else:
                assert chunk.finish_reason == "length"
                assert request.adapter not in ("bad", "nobody")
                assert chunk.completion_tokens == request.sampling.max_tokens
        return ends


@pytest.mark.parametrize(
    "shape",
    [
        {"slots": {16: 1}, "host_units": 2, "pages": 20, "max_rows": 4},
        {"slots": {8: 2, 16: 1}, "host_units": 4, "pages": 9, "max_rows": 6},
        {"slots": {8: 4, 16: 2}, "host_units": 12, "pages": 200, "max_rows": 8, "eviction": "cost"},
        {"slots": {8: 4, 16: 2}, "host_units": 60, "pages": 40, "max_rows": 12},
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_any_storm_ends_with_every_answer_right_and_everything_given_back(
    adapters: Adapters, shape: dict[str, Any], seed: int
) -> None:
    """12 storms of 2 500 events."""
    settings = {"max_batch_tokens": 24, "max_waiting": 40, "max_overtakes": 6, **shape}
    engine = ModellessEngine(adapters, **settings)
    try:
        storm = Storm(engine, random.Random(seed))
        while storm.events < 2500:
            storm.event()
        ends = await storm.ends()
        assert ends["length"] > 400
        assert ends["refused"] > 5
        for name in adapters.packed:
            storm.answers.append(engine.question(_unpin(adapters.digest(name))))
            engine.turn()
        for _ in range(1000):
            if engine.loop._idle() and all(answer.done() for answer in storm.answers):
                break
            engine.turn()
        failures = [answer.exception() for answer in storm.answers]
        assert all(failure is None or isinstance(failure, AdapterError | PinRefused) for failure in failures)
        engine.check_rest()
        assert engine.loop.stats().slot_evictions > 20
        assert engine.loop.stats().pinned == ()
    finally:
        engine.close()


async def test_room_that_a_pin_gives_back_while_nothing_runs_is_noticed(adapters: Adapters) -> None:
    engine = ModellessEngine(adapters, slots={8: 1, 16: 1}, host_units=2)
    try:
        running = [engine.ask(name, new=200) for name in ("a0", "a3")]
        engine.finish_loads()
        assert engine.loop.stats().running == 2
        pinned = adapters.digest("a1")
        fetched = engine.question(lambda residents, done: residents.prefetch("a1", pinned, done))
        engine.finish_loads()
        assert not fetched.result()
        pin = engine.question(lambda residents, done: residents.pin(pinned, done))
        large = engine.ask("a2", new=2)  # needs all of host memory, of which the pin has half
        engine.finish_loads()
        assert engine.store.host_cache.waited_only
        assert not pin.done()
        for sequence in running:
            engine.loop.leave(sequence)
        engine.drain()
        assert pin.done()
        assert large.completion_tokens == 2
        assert engine.loop.stats().pinned == (pinned,)
    finally:
        engine.close()


def _unpin(digest: str) -> Any:
    return lambda residents, done: residents.unpin(digest, done)

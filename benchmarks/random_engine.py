"""An engine of a known shape with random weights and random adapters, for measuring it without a server."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.settings import StoreSettings
from benchmarks.synthetic import write_model_config, write_random_adapter
from benchmarks.timeline import Timeline, follow
from engine.engine import Engine
from engine.lora_targets import adapter_layout
from engine.request import GenerationRequest, SamplingParams
from engine.settings import EngineSettings
from engine.spec import ModelSpec


@dataclass(slots=True)
class RandomEngine:
    """A started engine, its shape, the names of its adapters (all fit their slots), and how long its start took."""

    engine: Engine
    spec: ModelSpec
    adapters: list[str]
    start_s: float
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def request(self, adapter: str | None, prompt: int, tokens: int) -> GenerationRequest:
        """A greedy request over a random prompt of its own, so that no cache of prompts helps it."""
        ids = tuple(self._random.randrange(1000, self.spec.vocab_size - 1000) for _ in range(prompt))
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return GenerationRequest(f"request-{next(self._numbers)}", ids, sampling, adapter)

    async def batch(self, adapters: Sequence[str | None], prompt: int, tokens: int) -> list[Timeline]:
        """Run one batch of equal requests, all sent at once, one a row."""
        requests = [self.request(name, prompt, tokens) for name in adapters]
        return list(await asyncio.gather(*(follow(self.engine, request) for request in requests)))


@asynccontextmanager
async def random_engine(
    folder: Path, shape: str, adapters: int, rank: int, *, max_model_len: int, **settings: Any
) -> AsyncIterator[RandomEngine]:
    """An engine over ``adapters`` adapters of one rank, written under ``folder``; each has a slot and is in it.

    settings: further fields of ``EngineSettings``. A context longer than the shape's own is given to it.
    """
    model = write_model_config(folder / "model", shape, max_model_len)
    spec = ModelSpec.from_dir(model)
    layout = adapter_layout(spec)
    names = [f"adapter-{number:03d}" for number in range(adapters)]
    for number, name in enumerate(names):
        write_random_adapter(folder / "adapters" / name, layout, rank, number)
    engine = Engine(
        EngineSettings(
            model=str(model),
            max_model_len=max_model_len,
            slots=((rank, adapters),),
            store=StoreSettings(
                root=folder,
                folders=("adapters",),
                host_cache_bytes=(adapters + 1) * (4 * layout.slab_elements(rank) + 64),  # every one, in any dtype
            ),
            load_random_weights=True,
            seed=0,
            **settings,
        )
    )
    started = time.perf_counter()
    await engine.start()
    try:
        made = RandomEngine(engine, spec, names, time.perf_counter() - started)
        await made.batch(names, 16, 4)
        yield made
    finally:
        await engine.close()

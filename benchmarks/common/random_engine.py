"""An engine of a known shape with random weights and random adapters, for measuring it without a server."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from adapter_store.settings import StoreSettings
from benchmarks.common.synthetic import write_model_config, write_random_adapters
from benchmarks.common.timeline import Timeline, follow
from engine.engine import Engine
from engine.lora_targets import adapter_layout
from engine.request import GenerationRequest, SamplingParams
from engine.settings import EngineSettings
from engine.spec import ModelSpec


@dataclass(slots=True)
class RandomEngine:
    """A started engine, its shape, its adapters (name -> rank), and how long its start took.

    digests: the adapters' contents by name; requests say them, as those through a server do.
    """

    engine: Engine
    spec: ModelSpec
    ranks: dict[str, int]
    start_s: float
    digests: dict[str, str] = field(default_factory=dict)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def adapters(self) -> list[str]:
        """The adapters' names."""
        return list(self.ranks)

    @property
    def mean_rank(self) -> float:
        """Over the adapters."""
        return statistics.mean(self.ranks.values())

    def among(self, names: Sequence[str]) -> RandomEngine:
        """The same engine as if it had these adapters alone."""
        return replace(self, ranks={name: self.ranks[name] for name in names})

    def request(self, adapter: str | None, prompt: int, tokens: int) -> GenerationRequest:
        """A greedy request over a random prompt of its own, so that no cache of prompts helps it."""
        ids = tuple(self._random.randrange(1000, self.spec.vocab_size - 1000) for _ in range(prompt))
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        digest = None if adapter is None else self.digests.get(adapter)
        return GenerationRequest(f"request-{next(self._numbers)}", ids, sampling, adapter, digest)

    async def batch(self, adapters: Sequence[str | None], prompt: int, tokens: int) -> list[Timeline]:
        """Run one batch of equal requests, all sent at once, one a row."""
        requests = [self.request(name, prompt, tokens) for name in adapters]
        return list(await asyncio.gather(*(follow(self.engine, request) for request in requests)))


@asynccontextmanager
async def random_engine(
    folder: Path,
    shape: str,
    adapters: int,
    ranks: Sequence[int],
    *,
    max_model_len: int,
    slots: Mapping[int, int] | None = None,
    **settings: Any,
) -> AsyncIterator[RandomEngine]:
    """An engine over ``adapters`` adapters of these ranks in turns, written under ``folder``; each is in host memory,
    and in its slot unless there are fewer ``slots`` (rank -> count; default: one for each).

    settings: further fields of ``EngineSettings``. A context longer than the shape's own is given to it.
    """
    model = write_model_config(folder / "model", shape, max_model_len)
    spec = ModelSpec.from_dir(model)
    layout = adapter_layout(spec)
    chosen = {f"adapter-{number:03d}": ranks[number % len(ranks)] for number in range(adapters)}

    write_random_adapters(folder / "adapters", layout, chosen)
    element = 2 if torch.cuda.is_available() else 4  # bytes
    slab_bytes = sum(element * layout.slab_elements(rank) + 64 for rank in chosen.values())
    engine = Engine(
        EngineSettings(
            model=str(model),
            max_model_len=max_model_len,
            slots=tuple((slots or Counter(chosen.values())).items()),
            store=StoreSettings(
                root=folder,
                folders=("adapters",),
                host_cache_bytes=slab_bytes * 17 // 16,  # every one, and room where they do not fill it
            ),
            load_random_weights=True,
            seed=0,
            **settings,
        )
    )
    started = time.perf_counter()
    await engine.start()
    try:
        made = RandomEngine(engine, spec, chosen, time.perf_counter() - started)
        await made.batch(made.adapters, 16, 4)
        store = engine.parts.store
        assert store is not None
        made.digests |= {name: (await asyncio.to_thread(store.resolve, name)).digest for name in chosen}
        yield made
    finally:
        await engine.close()

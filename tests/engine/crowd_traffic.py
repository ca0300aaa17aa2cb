"""Requests of a crowd of tenants, by Zipf's law, and what became of each."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from adapter_store.errors import AdapterError
from benchmarks.common.distributions import zipf_weights
from engine.engine import Engine
from engine.request import GenerationChunk, GenerationRequest, SamplingParams
from tests.engine.crowd import NEW, Crowd, Tenant

AT_ONCE = 192  # requests: three times the rows


@dataclass(slots=True)
class Traffic:
    """leaving: the share of requests that end before their time, in one of two ways. refusable: tenants whose adapters
    may be unavailable. Every answer is checked when it comes; ``ends`` counts them.
    """

    engine: Engine
    crowd: Crowd
    rng: random.Random
    leaving: float = 0.0
    refusable: frozenset[str] = frozenset()
    ends: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)
    tokens: int = 0  # of the answers
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def run(self, count: int) -> None:
        """So many requests, ``AT_ONCE`` at any time."""
        tenants = self.rng.choices(self.crowd.tenants, zipf_weights(len(self.crowd.tenants), 1.0), k=count)
        rest = iter(tenants)

        async def user() -> None:
            for tenant in rest:
                await self.ask(tenant, leaves=self.rng.random() < self.leaving)

        async with asyncio.TaskGroup() as users:
            for _ in range(AT_ONCE):
                users.create_task(user())

    async def ask(self, tenant: Tenant, *, leaves: bool = False) -> None:
        """One request. leaves: its user goes, or has it aborted, whatever it has got by then."""
        digest = tenant.digest if self.rng.random() < 0.5 else None
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        name = f"r{next(self._numbers)}"
        request = GenerationRequest(name, tenant.prompt, sampling, tenant.name, digest)
        got: list[GenerationChunk] = []
        try:
            if leaves and self.rng.random() < 0.5:
                await self._begin(request, got)
            elif leaves:
                reading = asyncio.create_task(self._read(request, got))
                await asyncio.sleep(self.rng.random() * 0.1)
                self.engine.abort(name)
                await reading
            else:
                await self._read(request, got)
        except AdapterError as error:
            assert tenant.name in self.refusable, error
            self.ends[type(error).__name__] += 1
            self.failed.add(tenant.name)
            return
        self._check(tenant, got, leaves=leaves)

    def _check(self, tenant: Tenant, got: list[GenerationChunk], *, leaves: bool) -> None:
        text = "".join(chunk.text for chunk in got)
        tokens = tuple(token for chunk in got for token in chunk.token_ids)
        reason = got[-1].finish_reason if got else None
        self.tokens += len(tokens)
        if reason == "length":
            assert (tokens, text) == (tenant.tokens, tenant.text), tenant.name
            self.ends["exact"] += 1
        else:
            assert leaves, f"{tenant.name} ended with {reason}"
            assert tenant.tokens[: len(tokens)] == tokens
            assert tenant.text.startswith(text)
            self.ends["left"] += 1

    async def _read(self, request: GenerationRequest, got: list[GenerationChunk]) -> None:
        async for chunk in self.engine.generate(request):
            got.append(chunk)

    async def _begin(self, request: GenerationRequest, got: list[GenerationChunk]) -> None:
        """Read for a moment, or to the first chunk, then hang up."""
        patience = self.rng.choice((0.01, 0.05, 5.0))
        stream = self.engine.generate(request)
        try:
            got.append(await asyncio.wait_for(anext(stream), patience))
        except TimeoutError:
            pass
        finally:
            await stream.aclose()

"""Runs the real engine in tests: settings for tiny models, requests, and what transformers + peft would answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from adapter_store.settings import StoreSettings
from engine.engine import Engine
from engine.request import GenerationChunk, GenerationRequest, SamplingParams
from engine.settings import EngineSettings
from tests.engine.oracle import TinyAdapter, TinyModel


def word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Give a tiny random model a tokenizer: token i is the word ``ti``, decoded with spaces between."""
    if not (folder / "tokenizer.json").exists():
        backend = Backend(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def settings_for(model: TinyModel, adapters: Iterable[TinyAdapter] = (), **overrides: Any) -> EngineSettings:
    """A small fp32 CPU engine of this model, with these adapters under their names."""
    word_tokenizer(model.path, model.hf.config.vocab_size)
    store = StoreSettings(
        root=model.path.parent, adapters={adapter.name: f"local:{adapter.path}" for adapter in adapters}
    )
    values: dict[str, Any] = {
        "model": str(model.path),
        "device": "cpu",
        "cpu_threads": 1,
        "page_size": 4,
        "num_pages": 128,
        "max_rows": 8,
        "max_batch_tokens": 32,
        "slots": {16: 4},
        "store": store,
    }
    return EngineSettings(**{**values, **overrides})


@asynccontextmanager
async def running(settings: EngineSettings) -> AsyncIterator[Engine]:
    """A started engine, closed at the end."""
    engine = Engine(settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def ask(
    request_id: str,
    prompt: Sequence[int],
    adapter: TinyAdapter | str | None = None,
    *,
    new: int | None = 8,
    digest: str | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """A greedy request of ``new`` tokens that no end-of-sequence cuts short, unless ``sampling`` says otherwise."""
    name = adapter.name if isinstance(adapter, TinyAdapter) else adapter
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": new, **sampling})
    return GenerationRequest(request_id, tuple(prompt), params, name, digest)


async def answer(engine: Engine, request: GenerationRequest) -> GenerationChunk:
    """Everything a request produced, as one chunk."""
    whole: GenerationChunk | None = None
    async for chunk in engine.generate(request):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    return whole


async def answers(engine: Engine, requests: Iterable[GenerationRequest]) -> list[GenerationChunk]:
    """All requests at once."""
    return list(await asyncio.gather(*(answer(engine, request) for request in requests)))


@dataclass(frozen=True, slots=True)
class Expected:
    """Greedy tokens and their raw log probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def expected(model: TinyModel, prompt: Sequence[int], adapter: TinyAdapter | None, new: int) -> Expected:
    """Greedy generation by transformers + peft with that adapter alone, without a cache."""
    tokens, logprobs = list(prompt), []
    for _ in range(new):
        values = torch.log_softmax(model.logits(tokens, adapter)[-1].float(), dim=-1)
        tokens.append(int(values.argmax()))
        logprobs.append(float(values[tokens[-1]]))
    return Expected(tuple(tokens[len(prompt) :]), tuple(logprobs))


def assert_same(got: GenerationChunk, want: Expected, tolerance: float = 2e-5) -> None:
    """Tokens equal, log probabilities (asked for with ``logprobs=0``) within tolerance."""
    assert got.token_ids == want.tokens
    assert [entry.token_id for entry in got.logprobs] == list(want.tokens)
    for entry, logprob in zip(got.logprobs, want.logprobs, strict=True):
        assert abs(entry.logprob - logprob) <= tolerance

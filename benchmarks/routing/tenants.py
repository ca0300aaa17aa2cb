"""Adapters that all answer differently, and the exact text of every answer, made by one engine alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from benchmarks.common.synthetic import write_random_adapter
from engine.engine import Engine
from engine.lora_targets import adapter_layout
from engine.request import GenerationRequest, SamplingParams
from engine.settings import EngineSettings
from engine.spec import ModelSpec
from engine.tokenizer import Tokenizer
from examples.demo.words import held_out_prompts

MODEL = Path(__file__).parents[2] / "examples" / "demo" / "model"
SPREAD = 0.15  # of an adapter's weights: enough that no two adapters answer alike
# Logits of another batch differ by 2e-5 at most, so a greedy choice with more than this to spare is the same in all.
MARGIN = 1e-3
CANDIDATES = 4  # prompts tried for each that is wanted
SPARE = 0.1  # adapters made beyond those wanted: as many may answer like another one


Answers = Sequence[tuple[str, str]]  # prompts with their texts


@dataclass(frozen=True, slots=True)
class Tenants:
    """folder: one adapter a sub-folder. digests: of their contents, by name. answers: name -> (prompt, the text of its
    first ``tokens`` tokens)."""

    folder: Path
    digests: Mapping[str, str]
    tokens: int
    answers: Mapping[str, Answers]

    @property
    def names(self) -> list[str]:
        return list(self.answers)

    def question(self, name: str, seed: int) -> tuple[str, str]:
        """A prompt for this adapter and its exact answer."""
        own = self.answers[name]
        return own[seed % len(own)]


async def make_tenants(folder: Path, count: int, rank: int, prompts: int, tokens: int) -> Tenants:
    """Write adapters of the demo model, ask each ``prompts`` questions, choose ``count`` that all answer differently.

    Raises RuntimeError when there are not as many: a text could not tell one adapter from another then.
    """
    layout = adapter_layout(ModelSpec.from_dir(MODEL))
    names = [f"tenant-{number:03d}" for number in range(count + ceil(SPARE * count))]
    for number, name in enumerate(names):
        write_random_adapter(folder / name, layout, rank, number, SPREAD)
    settings = EngineSettings(
        model=str(MODEL),
        model_name="",
        device="cpu",
        slots=((rank, 32),),
        max_rows=32,
        max_waiting=len(names) * prompts * CANDIDATES,
        cpu_threads=1,
        num_pages=1024,
        store=StoreSettings(folders=(str(folder),), host_cache_bytes=2**28),
    )
    engine = Engine(settings)
    await engine.start()
    try:
        candidates = held_out_prompts(prompts * CANDIDATES)
        answers = await asyncio.gather(*(_answers(engine, name, candidates, prompts, tokens) for name in names))
    finally:
        await engine.close()
    clear = {name: own for name, own in zip(names, answers, strict=True) if len(own) == prompts}
    chosen = telling(clear, count)
    if len(chosen) < count:
        raise RuntimeError(
            f"of {len(names)} adapters {len(clear)} answer {prompts} of {len(candidates)} questions clearly, and "
            f"{len(chosen)} of them differently: other --tokens may help"
        )
    catalog = Catalog(settings.store)
    try:
        digests = {name: catalog.resolve(name).digest for name in chosen}
    finally:
        catalog.close()
    return Tenants(folder, digests, tokens, chosen)


def telling(answers: Mapping[str, Answers], count: int) -> dict[str, Answers]:
    """The first ``count`` adapters, or as many as there are, of which no two answer a question alike."""
    told: set[tuple[int, str]] = set()
    chosen: dict[str, Answers] = {}
    for name, own in answers.items():
        new = {(number, text) for number, (_, text) in enumerate(own)}
        if len(chosen) < count and told.isdisjoint(new):
            told |= new
            chosen[name] = own
    return chosen


async def _answers(
    engine: Engine, name: str, candidates: Sequence[str], wanted: int, tokens: int
) -> list[tuple[str, str]]:
    """The first ``wanted`` prompts that leave no doubt about a greedy choice, with their texts; all that there are of
    them when they are fewer."""
    found: list[tuple[str, str]] = []
    tokenizer = Tokenizer.from_dir(MODEL)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    for number, prompt in enumerate(candidates):
        request = GenerationRequest(f"{name}-{number}", tuple(tokenizer.encode(prompt)), sampling, name)
        chunks = [chunk async for chunk in engine.generate(request)]
        chosen = [token for chunk in chunks for token in chunk.logprobs]
        if all(first[1] - second[1] > MARGIN for first, second in (token.top[:2] for token in chosen)):
            found.append((prompt, "".join(chunk.text for chunk in chunks)))
        if len(found) == wanted:
            break
    return found

"""Runs steps of every size once before serving: kernels get compiled, and the memory a step takes is known."""

from __future__ import annotations

from collections.abc import Iterator

from engine.prompt_reading import reading_for
from engine.request import GenerationRequest, SamplingParams
from engine.runner import Runner
from engine.scheduler import PlannedRow, StepPlan
from engine.sequence import Sequence
from engine.settings import EngineSettings

# What a row asks of the sampler does not matter for its result here, only that every part of it runs.
_SAMPLING = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, logprobs=1, prompt_logprobs=1)


def rehearse(runner: Runner, settings: EngineSettings, max_model_len: int) -> None:
    """Prefill and decode steps of few to many rows and tokens, with a KV cache of their own.

    Leaves ``runner.kv`` as small as the longest rehearsed row needs: give the runner its real cache afterwards.
    """
    shapes = list(_shapes(settings, max_model_len))
    longest = max(length for _, length in shapes) + 1
    runner.kv = runner.model.new_kv_cache(-(-longest // settings.page_size), settings.page_size)
    for rows, length in shapes:
        pages = list(range(-(-(length + 1) // settings.page_size)))  # shared: what the rows read does not matter
        requests = [GenerationRequest(f"{row}", (0,) * length, _SAMPLING) for row in range(rows)]
        sequences = [
            Sequence(request, row, length + 1, seed=row, pages=pages, reading=reading_for(request))
            for row, request in enumerate(requests)
        ]
        _run(runner, sequences, 0, length, decode=False)
        for sequence in sequences:
            sequence.read(0)
            sequence.reading = None
        _run(runner, sequences[: settings.max_rows], length, length + 1, decode=True)


def _run(runner: Runner, sequences: list[Sequence], start: int, end: int, *, decode: bool) -> None:
    rows = tuple(PlannedRow(sequence, start, end, samples=True) for sequence in sequences)
    runner.launch(StepPlan(rows, len(rows) if decode else 0), always_lora=True).read()


def _shapes(settings: EngineSettings, max_model_len: int) -> Iterator[tuple[int, int]]:
    """(rows, prompt length): doubling numbers of rows with prompts of one, some and many pages, and the largest step.

    Launch parameters depend on the numbers of rows and tokens, and Triton compiles anew for a size of 1 and for
    multiples of 16; between them these shapes meet each case that serving meets.
    """
    most = max(max_model_len - 1, 1)
    rows = 1
    while rows < settings.max_rows:
        for pages in (0, 2, 15, 40):
            length = min(pages * settings.page_size + settings.page_size // 2 + 1, most)
            if rows * length <= settings.max_batch_tokens:
                yield rows, length
        rows *= 2
    yield settings.max_rows, min(settings.max_batch_tokens // settings.max_rows, most)
    yield -(-settings.max_batch_tokens // most), min(settings.max_batch_tokens, most)

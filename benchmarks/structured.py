"""What rows that follow a grammar, or are penalised, cost the others in their batch: the step of the free rows.

    python -m benchmarks.structured --shape llama-3-8b --batch 64 --structured 8 --json structured.json
    python -m benchmarks.structured --shape tiny --batch 8 --structured 2 --tokens 32      # a look on a CPU

Weights and the vocabulary are random; the latter's words are as long as those of a real one. Each mode is a batch of
equal size, all sent at once, on the base model; free rows are greedy. Steps are timed where all rows decode, each mode
``--repeat`` times in turns. ratio is the median step of a mode's free rows over that of ``free`` rows alone.

free: nothing asked. structured: the last ``--structured`` rows follow a JSON schema. fewer: the free rows of
``structured`` alone. penalised: every row has all three penalties. biased: every row has 300 biases. mask_us is what
the host takes for the masks of a step's structured rows, while the device works.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.percentile import percentile
from benchmarks.common.random_engine import RandomEngine, random_engine
from benchmarks.common.report import Report, Row, device_name
from benchmarks.common.synthetic import SHAPES, write_model_config, write_random_tokenizer
from benchmarks.common.timeline import Timeline, follow
from engine.request import GenerationRequest, Grammar

_SCHEMA = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["person", "place", "thing"]},
            "size": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,9}$"}, "maxItems": 4},
        },
        "required": ["name", "kind", "size"],
        "additionalProperties": False,
    },
}
_GRAMMAR = Grammar("json_schema", json.dumps(_SCHEMA))
_PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
_BIASES = tuple((token, 0.5) for token in range(1000, 1300))
_MODES = ("free", "structured", "fewer", "penalised", "biased")


@dataclass(frozen=True, slots=True)
class Batches:
    """What is measured: batches of ``rows`` rows, ``structured`` of them structured, ``tokens`` new tokens each."""

    rows: int
    structured: int
    prompt: int
    tokens: int

    async def measure(self, made: RandomEngine, repeat: int) -> list[Row]:
        """A row for each mode."""
        steps: dict[str, list[float]] = {mode: [] for mode in _MODES}
        for turn in range(repeat + 1):
            for mode in _MODES:
                requests = self.requests(made, mode)
                lines = await asyncio.gather(*(follow(made.engine, request) for request in requests))
                if turn:  # the first one warms up
                    steps[mode] += _steps_ms(requests, lines)
        free = statistics.median(steps["free"])
        return [
            {
                "mode": mode,
                "batch": self.rows - (self.structured if mode == "fewer" else 0),
                "structured": self.structured if mode == "structured" else 0,
                "step_ms_p50": statistics.median(steps[mode]),
                "step_ms_mean": statistics.mean(steps[mode]),
                "step_ms_p99": percentile(steps[mode], 0.99),
                "ratio": statistics.median(steps[mode]) / free,
                "mask_us": mask_us(made, self.structured) if mode == "structured" else 0.0,
            }
            for mode in _MODES
        ]

    def requests(self, made: RandomEngine, mode: str) -> list[GenerationRequest]:
        """The batch of a mode."""
        count = self.rows - self.structured if mode == "fewer" else self.rows
        requests = [made.request(None, self.prompt, self.tokens) for _ in range(count)]
        changed: dict[str, Any] = {"penalised": _PENALTIES, "biased": {"logit_bias": _BIASES}}.get(mode, {})
        if mode == "structured":
            # These run in every other step.
            changed = {"grammar": _GRAMMAR, "temperature": 1.0, "max_tokens": self.tokens // 2, "ignore_eos": False}
        first = self.rows - self.structured if mode == "structured" else 0
        return [
            replace(request, sampling=replace(request.sampling, **changed)) if number >= first else request
            for number, request in enumerate(requests)
        ]


def _steps_ms(requests: Sequence[GenerationRequest], lines: Sequence[Timeline]) -> list[float]:
    """Times between tokens of rows without a grammar, while all rows decode."""
    start, end = max(line.tokens[0] for line in lines), min(line.tokens[-1] for line in lines)
    steps = [
        (later - earlier) * 1e3
        for request, line in zip(requests, lines, strict=True)
        if request.sampling.grammar is None
        for earlier, later in zip(line.tokens, line.tokens[1:], strict=False)
        if earlier >= start and later <= end
    ]
    if not steps:
        raise ValueError("the rows never decoded all at once: raise --tokens")
    return steps


def mask_us(made: RandomEngine, rows: int, steps: int = 200) -> float:
    """Microseconds for the masks of so many rows that follow the grammar, in the mean of a random walk."""
    grammars = made.engine.parts.grammars
    assert grammars is not None
    pick, spent = random.Random(0), 0.0
    states = [grammars.start(_GRAMMAR) for _ in range(rows)]
    for _ in range(steps):
        for state in states:
            bits = torch.from_numpy(state.mask.copy())
            words = torch.nonzero(bits).flatten().tolist()
            word = pick.choice(words)
            value = int(bits[word]) & 0xFFFFFFFF
            tokens = [32 * word + bit for bit in range(32) if value >> bit & 1]
            state.advance(pick.choice(tokens))
        started = time.perf_counter()
        grammars.look_ahead(states)
        spent += time.perf_counter() - started
    return spent / steps * 1e6


async def run(arguments: argparse.Namespace, folder: Path) -> Report:
    """Build the engine once and measure every mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = arguments.prompt + arguments.tokens
    model = write_model_config(folder / "model", arguments.shape, longest + 16)
    write_random_tokenizer(model)
    async with random_engine(
        folder, arguments.shape, 1, [8], max_model_len=longest + 16, max_rows=arguments.batch, prefix_cache=False
    ) as made:
        batches = Batches(arguments.batch, arguments.structured, arguments.prompt, arguments.tokens)
        return Report("structured", device_name(device), await batches.measure(made, arguments.repeat))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--batch", type=int, default=64, help="rows")
    parser.add_argument("--structured", type=int, default=8, help="of them, rows that follow a grammar")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of a free row")
    parser.add_argument("--repeat", type=int, default=3, help="times that every mode is measured")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not 0 < arguments.structured < arguments.batch:
        parser.error(f"--structured is {arguments.structured}: give some, and fewer than --batch {arguments.batch}")
    with tempfile.TemporaryDirectory(prefix="lorafleet-structured-") as folder:
        asyncio.run(run(arguments, Path(folder))).write(arguments.json)


if __name__ == "__main__":
    main()

"""Steady-state decode step of one engine, with every row on its own adapter, beside the time the bytes alone take.

    python -m benchmarks.decode --shape llama-3-8b --batch 1,8,32,64 --adapters 8 --rank 16 --dist distinct,base

Weights are random, adapters are real PEFT folders written first. A row's steps are timed where all rows decode: from
the last first token to the first finish.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from adapter_store.settings import StoreSettings
from benchmarks.distributions import DISTRIBUTIONS, choose_adapters
from benchmarks.report import Report, Row, device_name
from benchmarks.synthetic import SHAPES, write_model_config, write_random_adapter
from benchmarks.timing import copy_bandwidth
from engine.engine import Engine
from engine.lora_targets import adapter_layout
from engine.request import GenerationRequest, SamplingParams
from engine.settings import EngineSettings
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Timeline:
    """When one request was sent and when each of its tokens arrived, in seconds."""

    sent: float
    tokens: tuple[float, ...]


async def _timeline(engine: Engine, request: GenerationRequest) -> Timeline:
    sent = time.perf_counter()
    times: list[float] = []
    async for chunk in engine.generate(request):
        times += [time.perf_counter()] * (chunk.completion_tokens - len(times))
    return Timeline(sent, tuple(times))


async def measure(engine: Engine, adapters: list[str | None], prompt: int, tokens: int, vocab: int) -> list[Timeline]:
    """Run one batch of equal requests at once."""
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [
        GenerationRequest(f"row-{row}", tuple(rng.randrange(1000, vocab - 1000) for _ in range(prompt)), sampling, name)
        for row, name in enumerate(adapters)
    ]
    return list(await asyncio.gather(*(_timeline(engine, request) for request in requests)))


def summarize(lines: list[Timeline]) -> Row:
    """Step percentiles in the window where every row decodes, tokens a second there, and time to first token."""
    start = max(line.tokens[0] for line in lines)
    end = min(line.tokens[-1] for line in lines)
    steps = sorted(
        (later - earlier) * 1e3
        for line in lines
        for earlier, later in zip(line.tokens, line.tokens[1:], strict=False)
        if earlier >= start and later <= end
    )
    produced = sum(start < moment <= end for line in lines for moment in line.tokens)
    first = sorted((line.tokens[0] - line.sent) * 1e3 for line in lines)
    return {
        "step_ms_p50": statistics.median(steps),
        "step_ms_p99": steps[math.ceil(0.99 * len(steps)) - 1],
        "tok_s": produced / (end - start),
        "ttft_ms_p50": statistics.median(first),
    }


def weight_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes of base weights that one decode step reads: all layers and the output head, not the embedding table."""
    layout = adapter_layout(spec)
    linear = sum(module.in_features * module.out_features for group in layout.groups for module in group.modules)
    return element * (spec.num_layers * linear + spec.vocab_size * spec.hidden_size)


async def run(arguments: argparse.Namespace, folder: Path) -> Report:
    """Build the engine once and measure every batch and distribution."""
    model = write_model_config(folder / "model", arguments.shape)
    spec = ModelSpec.from_dir(model)
    layout = adapter_layout(spec)
    names = [f"adapter-{number:03d}" for number in range(arguments.adapters)]
    for number, name in enumerate(names):
        write_random_adapter(folder / "adapters" / name, layout, arguments.rank, number)
    batches = [int(text) for text in arguments.batch.split(",")]
    settings = EngineSettings(
        model=str(model),
        max_model_len=arguments.prompt + arguments.tokens + 16,
        max_rows=max(batches),
        max_batch_tokens=max(8192, *batches),
        slots=((arguments.rank, len(names)),),
        store=StoreSettings(root=folder, folders=("adapters",), host_cache_bytes=64 << 30),
        load_random_weights=True,
        seed=0,
    )
    engine = Engine(settings)
    started = time.perf_counter()
    await engine.start()
    start_s = time.perf_counter() - started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    element = 2 if device.type == "cuda" else 4
    bandwidth = copy_bandwidth(device)
    adapter_bytes = arguments.rank * layout.units * element
    rng = random.Random(0)
    rows: list[Row] = []
    try:
        await measure(engine, list(names), 16, 4, spec.vocab_size)
        for distribution in arguments.dist.split(","):
            for batch in batches:
                numbers = choose_adapters(distribution, batch, len(names), rng)
                chosen = [None if number < 0 else names[number] for number in numbers]
                await measure(engine, chosen, arguments.prompt, 8, spec.vocab_size)
                lines = await measure(engine, chosen, arguments.prompt, arguments.tokens, spec.vocab_size)
                used = len({name for name in chosen if name is not None})
                floor = (weight_bytes(spec, element) + used * adapter_bytes) / bandwidth * 1e3
                rows.append(
                    {"mode": distribution, "batch": batch, "rank": arguments.rank, "adapters": used}
                    | summarize(lines)
                    | {"floor_ms": floor, "start_s": start_s, "copy_tb_s": bandwidth / 1e12}
                )
                print(rows[-1], flush=True)
    finally:
        await engine.close()
    return Report("decode", device_name(device), rows)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--batch", default="1,8,32,64", help="batch sizes, comma separated")
    parser.add_argument("--adapters", type=int, default=8, help="adapters to make; a larger batch shares them")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dist", default="distinct,base", help=f"of {', '.join(DISTRIBUTIONS)}, comma separated")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if unknown := set(arguments.dist.split(",")) - set(DISTRIBUTIONS):
        parser.error(f"--dist {', '.join(sorted(unknown))}: choose from {', '.join(DISTRIBUTIONS)}")
    with tempfile.TemporaryDirectory(prefix="lorafleet-decode-") as folder:
        asyncio.run(run(arguments, Path(folder))).write(arguments.json)


if __name__ == "__main__":
    main()

"""Whole batches of equal requests: the step while every row decodes, beside the time the bytes alone take."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.common.distributions import choose_adapters
from benchmarks.common.percentile import percentile
from benchmarks.common.random_engine import RandomEngine
from benchmarks.common.report import Row
from benchmarks.common.running_rows import RunningRows
from benchmarks.common.timeline import Timeline
from benchmarks.common.timing import copy_bandwidth
from benchmarks.decode.gpu_trace import KernelTimes, ReplayGaps
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec

_TRACED = 24  # steps
_KERNELS = 20  # printed


@dataclass(frozen=True, slots=True)
class DecodeBatches:
    """What is measured: every distribution with every batch, requests of ``prompt`` tokens that make ``tokens``."""

    distributions: Sequence[str]
    batches: Sequence[int]
    prompt: int
    tokens: int

    async def measure(self, made: RandomEngine, device: torch.device) -> list[Row]:
        """One row for each; those with adapters say what they cost over the base row, where that was measured."""
        element = 2 if device.type == "cuda" else 4
        bandwidth = copy_bandwidth(device)
        unit_bytes = adapter_layout(made.spec).units * element
        rng = random.Random(0)
        rows: list[Row] = []
        for distribution in self.distributions:
            for batch in self.batches:
                numbers = choose_adapters(distribution, batch, len(made.adapters), rng)
                chosen = [None if number < 0 else made.adapters[number] for number in numbers]
                await made.batch(chosen, self.prompt, 8)
                lines = await made.batch(chosen, self.prompt, self.tokens)
                used = {name for name in chosen if name is not None}
                ranks = sum(made.ranks[name] for name in used)
                floor = (weight_bytes(made.spec, element) + ranks * unit_bytes) / bandwidth * 1e3
                rank = made.mean_rank
                row = {"mode": distribution, "batch": batch, "rank": rank, "adapters": len(used)} | summarize(lines)
                rows.append(row | {"floor_ms": floor, "start_s": made.start_s, "copy_tb_s": bandwidth / 1e12})
                print(rows[-1], flush=True)
        return with_added_cost(rows)

    async def trace(self, made: RandomEngine) -> None:
        """Print what the GPU does while rows of the largest batch decode, for each distribution."""
        with KernelTimes():  # the first one takes its time to begin
            pass
        for distribution in self.distributions:
            numbers = choose_adapters(distribution, max(self.batches), len(made.adapters), random.Random(0))
            chosen = [None if number < 0 else made.adapters[number] for number in numbers]
            requests = [made.request(name, self.prompt, self.tokens) for name in chosen]
            async with RunningRows(made.engine, requests, 4) as running:
                with ReplayGaps() as gaps:
                    await running.steps(_TRACED)
                with KernelTimes() as times:
                    await running.steps(_TRACED)
            print(f"{distribution}, batch {len(chosen)}: {gaps.share():.2%} between steps; kernels, us a step:")
            for name, us in list(times.a_step().items())[:_KERNELS]:
                print(f"{us:10.1f}  {name[:100]}", flush=True)


def summarize(lines: Sequence[Timeline]) -> Row:
    """Step percentiles in the window where every row decodes, tokens a second there, and time to first token."""
    start = max(line.tokens[0] for line in lines)
    end = min(line.tokens[-1] for line in lines)
    steps = [
        (later - earlier) * 1e3
        for line in lines
        for earlier, later in zip(line.tokens, line.tokens[1:], strict=False)
        if earlier >= start and later <= end
    ]
    if not steps:
        raise ValueError("the rows never decoded all at once: raise --tokens")
    produced = sum(start < moment <= end for line in lines for moment in line.tokens)
    return {
        "step_ms_p50": statistics.median(steps),
        "step_ms_p99": percentile(steps, 0.99),
        "tok_s": produced / (end - start),
        "ttft_ms_p50": statistics.median(line.ttft_ms for line in lines),
    }


def with_added_cost(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``lora_ms``: median step over that of the base row of the same batch, if any."""
    base = {row["batch"]: row["step_ms_p50"] for row in rows if row["mode"] == "base"}
    return [
        row | {"lora_ms": row["step_ms_p50"] - base[row["batch"]]}
        if row["mode"] != "base" and row["batch"] in base
        else row
        for row in rows
    ]


def weight_bytes(spec: ModelSpec, element: int) -> int:
    """Bytes of base weights that one decode step reads: all layers and the output head, not the embedding table."""
    layout = adapter_layout(spec)
    linear = sum(module.in_features * module.out_features for group in layout.groups for module in group.modules)
    return element * (spec.num_layers * linear + spec.vocab_size * spec.hidden_size)

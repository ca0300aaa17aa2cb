"""How many slots, pages and replicas: a calculator over the settings of a server.

    python -m deployments.sizing --gpu-gib 80                                   # serve_config.yaml
    python -m deployments.sizing --model /models/Llama-3.1-8B --gpu-gib 80 --slots 16:64,64:4 --rows 64
    python -m deployments.sizing --gpu-gib 80 --adapters 2000 --rate 40 --step-ms 9.4

The base model's config.json is enough; there need be no GPU here. With ``--adapters`` it says how many requests find
their adapter in a slot, by Zipf's law, and how much host memory keeps the others off the disk; with ``--rate``, how
many replicas that takes. ``--step-ms`` is one decode step of a full batch: measure it with ``benchmarks.decode``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from deployments.settings_file import DEFAULT_CONFIG, read_settings, stop
from engine.lora_targets import adapter_layout
from engine.memory_plan import MemoryPlan, slab_bytes
from engine.parts import dtype_on
from engine.settings import EngineSettings
from engine.spec import ModelSpec

GIB = 2**30
BUSY = 0.8  # of a replica's rows: with more, arrivals wait


def memory(plan: MemoryPlan, settings: EngineSettings, spec: ModelSpec) -> Iterator[str]:
    """Where one replica's GPU memory goes."""
    yield f"GPU memory of one replica      {_gib(plan.total)}"
    yield f"  context, libraries, graphs   {_gib(plan.reserved)}   (--reserve-gib)"
    yield f"  weights                      {_gib(plan.weights)}"
    for rank, count in settings.slots:
        each = plan.slots[rank] / count / 2**20
        label = f"  {count} slots of rank {rank}"
        yield f"{label:<31}{_gib(plan.slots[rank])}   {each:.1f} MiB each"
    yield f"  one step                     {_gib(plan.step)}   (estimated; the engine measures it at its start)"
    context = spec.context(settings.max_model_len)
    if plan.pages < 1:
        yield (
            f"  KV cache                     nothing is left: {_gib(-plan.free).strip()} too little; lower slots, "
            "max_rows or max_batch_tokens, or take a larger GPU"
        )
        return
    pages = f"{plan.pages} pages of {plan.page_size} tokens"
    yield f"  KV cache                     {_gib(plan.pages * plan.page)}   {pages}"
    yield (
        f"KV cache: {plan.tokens} tokens, {plan.tokens // settings.max_rows} for each of {settings.max_rows} rows; "
        f"{plan.tokens / context:.1f} contexts of {context}"
    )
    if settings.num_pages is None and plan.tokens >= settings.max_rows * context:
        yield f"{settings.max_rows} rows can fill no more: the rest of the memory has room for more rows or slots"


def demand(arguments: argparse.Namespace, plan: MemoryPlan, settings: EngineSettings, spec: ModelSpec) -> Iterator[str]:
    """What so many adapters and requests take."""
    slots = sum(count for _, count in settings.slots)
    replicas = 1
    if arguments.rate is not None:
        # A row is busy for a step a token, and its prompt for about another.
        rows = arguments.rate * (arguments.output + 1) * arguments.step_ms / 1e3
        held = plan.tokens // max(arguments.prompt + arguments.output, 1)
        each = max(min(settings.max_rows, held), 1)
        replicas = max(math.ceil(rows / (BUSY * each)), 1)
        limit = "rows" if each == settings.max_rows else "pages"
        yield (
            f"{arguments.rate:g} requests a second of {arguments.prompt}+{arguments.output} tokens keep {rows:.0f} "
            f"rows busy: {replicas} replicas of {each} rows (bounded by {limit}) at {100 * BUSY:.0f} % load"
        )
    if arguments.adapters is None:
        return
    total = replicas * slots
    hits = zipf_share(total, arguments.adapters, arguments.zipf)
    largest = slab_bytes(adapter_layout(spec), settings.max_rank, dtype_on(settings, torch.device("cuda")))
    yield (
        f"{arguments.adapters} adapters on {replicas} x {slots} slots: at best {100 * hits:.1f} % of requests find "
        f"theirs in a slot (Zipf {arguments.zipf:g})"
    )
    for share in (0.9, 0.95, 0.99):
        need = next((n for n in range(1, arguments.adapters + 1) if _share(n, arguments) >= share), arguments.adapters)
        yield f"  {100 * share:.0f} % need {need} slots in all, {math.ceil(need / replicas)} a replica"
    host = math.ceil(arguments.adapters / replicas) * largest
    yield (
        f"store.host_cache_bytes: {host} ({_gib(host).strip()}) a replica keep all of them in host memory, each at one "
        f"replica, at rank {settings.max_rank}; set now: {settings.store.host_cache_bytes}"
    )


def zipf_share(most: int, adapters: int, exponent: float) -> float:
    """The share of requests that go to the ``most`` most wanted of ``adapters``."""
    weights = [1 / n**exponent for n in range(1, adapters + 1)]
    return sum(weights[:most]) / sum(weights)


def _share(most: int, arguments: argparse.Namespace) -> float:
    return zipf_share(most, arguments.adapters, arguments.zipf)


def _gib(count: float) -> str:
    return f"{count / GIB:8.2f} GiB"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, calculate, print."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.sizing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="Serve's configuration (serve_config.yaml)")
    parser.add_argument("--model", type=Path, help="folder of the base model, instead of the configuration's")
    parser.add_argument("--gpu-gib", type=float, required=True, help="memory of one GPU, as nvidia-smi shows it")
    parser.add_argument("--reserve-gib", type=float, default=3.0, help="CUDA context, libraries, captured steps")
    parser.add_argument("--slots", type=_slots, help="rank:count, comma separated, instead of the configuration's")
    parser.add_argument("--rows", type=int, help="instead of engine.max_rows")
    parser.add_argument("--adapters", type=int, help="how many there are")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of their shares; 0: all alike")
    parser.add_argument("--rate", type=float, help="requests a second, in all")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt, in the mean")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer, in the mean")
    parser.add_argument("--step-ms", type=float, help="one decode step of a full batch, measured")
    parsed = parser.parse_args(arguments)
    if parsed.rate is not None and parsed.step_ms is None:
        parser.error("--rate needs --step-ms: measure it with python -m benchmarks.decode")
    if parsed.adapters is not None and parsed.adapters < 1:
        parser.error(f"--adapters is {parsed.adapters} but must be 1 or more")
    settings = read_settings(parsed.config, parsed.model)
    changed = {"slots": parsed.slots, "max_rows": parsed.rows}
    try:
        engine = settings.model_copy(
            update={
                "engine": settings.engine.model_copy(update={k: v for k, v in changed.items() if v is not None}),
            }
        ).engine_settings()
        spec = ModelSpec.from_dir(settings.model_folder())
        share = settings.replicas.num_gpus
        of_gpu = share if isinstance(share, float) and 0 < share < 1 else 1.0
        total, reserved = int(parsed.gpu_gib * GIB * of_gpu), int(parsed.reserve_gib * GIB)
        plan = MemoryPlan.of(spec, engine, dtype_on(engine, torch.device("cuda")), total, reserved)
    except (OSError, ValueError) as error:
        stop(str(error))
    for line in (*memory(plan, engine, spec), *demand(parsed, plan, engine, spec)):
        print(line)


def _slots(text: str) -> dict[int, int]:
    return {int(rank): int(count) for rank, count in (part.split(":") for part in text.split(","))}


if __name__ == "__main__":
    main()

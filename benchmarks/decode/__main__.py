"""Steady-state decode step of one engine, with every row on its own adapter, beside the time the bytes alone take.

    python -m benchmarks.decode --shape llama-3-8b --batch 1,8,32,64,128 --adapters 64 --rank 16 --dist distinct,base
    python -m benchmarks.decode --json decode.json --plot decode.png --rival other-engine.json
    python -m benchmarks.decode --arrivals --long-prompt 8192 --rows 24
    python -m benchmarks.decode --shape tiny --batch 1,4 --adapters 4 --tokens 32          # a look on a CPU

Weights are random, adapters are real PEFT folders written first, prompts are random and no two alike.

Batches: all requests of a batch are sent at once. Steps are timed where all rows decode, from the last first token to
the first finish. floor_ms is the time to read the weights and the adapters in use once, at the bandwidth of a copy on
this device (keys and values not counted); lora_ms is what the median step takes over that of the base model in the same
batch, where ``base`` is one of the distributions.

Arrivals, instead of batches: ``--rows`` rows decode, each on an adapter of its own. With ``--arrivals`` a request of
``--prompt`` tokens arrives every eighth step on an adapter that is in its slot; with ``--long-prompt N`` one of N
tokens arrives, three times in turn. itl_ms is what the running rows wait between tokens from the first arrival on (a
long prompt: from its sending to its first token), quiet_itl_ms the same before anything arrived; ttft_ms is the
arrivals'.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.distributions import DISTRIBUTIONS
from benchmarks.common.options import picture, some_of
from benchmarks.common.random_engine import random_engine
from benchmarks.common.report import Report, Row, device_name
from benchmarks.common.synthetic import SHAPES
from benchmarks.decode.arrivals import RUNNING_TOKENS, DecodeArrivals
from benchmarks.decode.batches import DecodeBatches


async def run(arguments: argparse.Namespace, folder: Path) -> Report:
    """Build the engine once and measure everything asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrivals = arguments.arrivals or arguments.long_prompt
    settings: dict[str, Any] = {}
    if arrivals:
        longest = max(arguments.prompt + RUNNING_TOKENS, (arguments.long_prompt or 0) + 1)
        settings["max_rows"] = arguments.rows + 8
    else:
        longest = arguments.prompt + arguments.tokens
        settings["max_rows"] = max(arguments.batch)
        settings["max_batch_tokens"] = max(8192, *arguments.batch)
    if arguments.batch_tokens:
        settings["max_batch_tokens"] = arguments.batch_tokens
    if arguments.graph_prefill:
        settings["graph_prefill_tokens"] = tuple(arguments.graph_prefill)
    if arguments.mixed_tokens:
        settings["max_mixed_tokens"] = arguments.mixed_tokens
    rows: list[Row] = []
    async with random_engine(
        folder, arguments.shape, arguments.adapters, arguments.rank, max_model_len=longest + 16, **settings
    ) as made:
        if not arrivals:
            batches = DecodeBatches(arguments.dist, arguments.batch, arguments.prompt, arguments.tokens)
            rows += await batches.measure(made, device)
            if arguments.trace:
                await batches.trace(made)
        measured = DecodeArrivals(arguments.rows, arguments.prompt)
        if arguments.arrivals:
            rows.append(await measured.short(made, arguments.arrivals))
        if arguments.long_prompt:
            rows.append(await measured.long(made, arguments.long_prompt))
    return Report("decode", device_name(device), rows)


def main() -> None:
    """Parse the command line, measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--batch", type=_numbers, default="1,8,32,64,128", help="batch sizes, comma separated")
    parser.add_argument("--adapters", type=int, default=64, help="adapters to make; a larger batch shares them")
    parser.add_argument("--rank", type=_numbers, default="16", help="ranks that the adapters have in turns")
    parser.add_argument(
        "--dist",
        type=some_of(DISTRIBUTIONS),
        default="distinct,base",
        help=f"of {', '.join(DISTRIBUTIONS)}, comma separated",
    )
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument(
        "--batch-tokens", type=int, help="the engine's max_batch_tokens (default: its own; with batches 8192 or more)"
    )
    parser.add_argument("--graph-prefill", type=_numbers, help="the engine's graph_prefill_tokens, comma separated")
    parser.add_argument("--mixed-tokens", type=int, help="the engine's max_mixed_tokens (default: its own)")
    parser.add_argument(
        "--trace", action="store_true", help="on a GPU, also print what lies between steps, and the kernels of one"
    )
    parser.add_argument(
        "--arrivals", type=int, nargs="?", const=32, metavar="COUNT", help="short prompts that arrive (default 32)"
    )
    parser.add_argument("--long-prompt", type=int, metavar="TOKENS", help="a prompt of that many tokens arrives")
    parser.add_argument("--rows", type=int, default=24, help="rows that decode while others arrive")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--plot", type=picture, help="also draw the batches here (PNG)")
    parser.add_argument("--rival", type=Path, action="append", default=[], help="rows of another engine for the plot")
    arguments = parser.parse_args()
    if arguments.rival and not arguments.plot:
        parser.error("--rival is for the plot: say where with --plot FILE.png")
    if arguments.plot and (arguments.arrivals or arguments.long_prompt):
        parser.error("--plot draws batches, and with --arrivals or --long-prompt none are measured")
    with tempfile.TemporaryDirectory(prefix="lorafleet-decode-") as folder:
        report = asyncio.run(run(arguments, Path(folder)))
    report.write(arguments.json)
    if arguments.plot:
        from benchmarks.plot.draw import save  # noqa: PLC0415 (matplotlib is an extra)

        save(report.to_dict(), arguments.plot, arguments.rival)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()

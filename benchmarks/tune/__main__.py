"""Searches launch configurations of the LoRA kernels and writes the table that ships for this GPU.

    python -m benchmarks.tune                                    # everything, into kernels/configs/<device>.json
    python -m benchmarks.tune --ops expand,shrink --rank 16,64 --seconds 120

Each configuration of a small declared space is compiled, compared with the kernel's torch twin, timed at every batch
in a CUDA graph that starts with an empty L2, and the best are timed once more in turns. A (width, rank) gets rows where
some batch gains more than 3 % over the default; rows of other keys stay as they are. A row's result must not depend on
its batch, so the batches of one key share whatever decides the order of its sums.

On a CPU nothing is compiled and the times mean nothing: give ``--out`` to look at the tuner itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.synthetic import SHAPES
from benchmarks.kernels.grid import FULL, TINY
from benchmarks.kernels.precompile import default_workers
from benchmarks.tune.problem import OPS, SHARED, problems
from benchmarks.tune.search import tune
from benchmarks.tune.table import key_of, table_path
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from kernels.op_configs import CONFIGS_DIR


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Parse the command line, search, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda text: tuple(text.split(",")), default=OPS, help=f"of {', '.join(OPS)}")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b", help="model of the packed groups")
    parser.add_argument("--hidden", type=_numbers, help="widths of expand and shrink")
    parser.add_argument("--rank", type=_numbers, help="ranks")
    parser.add_argument("--batch", type=_numbers, help="batches of the decode kernels")
    parser.add_argument("--seconds", type=float, default=300, help="start no further search after this long")
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--workers", type=int, default=default_workers() if on_gpu else 0, help="processes that compile"
    )
    parser.add_argument("--out", type=Path, help="folder of the table (default: kernels/configs, on a GPU)")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"--ops {', '.join(sorted(unknown))}: choose from {', '.join(OPS)}")
    if arguments.out is None and not on_gpu:
        parser.error("no GPU here: times mean nothing; give --out FOLDER to write a table all the same")
    grid = TINY if arguments.shape == "tiny" else FULL
    spec = ModelSpec.from_config(SHAPES[arguments.shape], arguments.shape)
    hidden, ranks = arguments.hidden or grid.hidden, arguments.rank or grid.rank
    twice = () if arguments.batch else (grid.twice_batch,)
    batches = arguments.batch or grid.batch
    todo = [
        problem
        for op in arguments.ops
        for problem in problems(
            op, adapter_layout(spec), hidden, ranks, twice or batches if op in SHARED else batches, grid.segments
        )
    ]
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    path = table_path(arguments.out or CONFIGS_DIR, device)
    rows = tune(todo, arguments.workers, arguments.seconds, path)
    print(f"{path}: {len({key_of(row) for row in rows})} of {len(todo)} keys beat their defaults")


if __name__ == "__main__":
    main()

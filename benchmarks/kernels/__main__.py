"""Time of each kernel beside the time its bytes take, and beside other ways to compute the same.

    python -m benchmarks.kernels --json benchmarks/results/kernels-h100.json
    python -m benchmarks.kernels --ops expand,shrink --rank 16 --rival path/to/bgmv_expand.py:bgmv_expand
    python -m benchmarks.kernels --shape tiny                      # a look at the benchmark itself, on a CPU

``us`` is the median in a CUDA graph that starts with an empty L2 and reads other adapters in every step. ``bytes`` is
what must move, each adapter of the batch once; ``floor_us`` is that at the copy bandwidth measured in the same run, and
``of_copy`` the part of it that was reached. ``limit_us`` is what this project asks of the kernel on an H100.
``x_...`` is how many times longer a rival took in the same run: gather + bmm, a loop over the adapters, torch's own
operations, and ``--rival``. For ``lora_step`` the times are what LoRA adds to the base products of a whole step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common.report import Report, Row, device_name
from benchmarks.common.synthetic import SHAPES
from benchmarks.kernels.grid import FULL, OPS, TINY, Grid, cases
from benchmarks.kernels.precompile import default_workers, precompile
from benchmarks.kernels.rivals import Rival
from benchmarks.kernels.setting import KernelSetting
from engine.spec import ModelSpec


@torch.inference_mode()
def run(ops: tuple[str, ...], grid: Grid, spec: ModelSpec, rivals: tuple[Rival, ...], workers: int) -> Report:
    """Measure every case; each row is printed as it comes.

    workers: processes that compile beforehand; 0 for none. A case that fails leaves no row and says so on stderr.
    """
    chosen = list(cases(grid, ops, spec, rivals))
    if workers:
        print(f"compiled in {precompile(chosen, workers):.1f} s", flush=True)
    setting = KernelSetting()
    rows: list[Row] = []
    failed = 0
    for case in chosen:
        try:
            for row in case.rows(setting):
                rows.append(row)
                print(json.dumps(row), flush=True)
        except Exception as error:
            failed += 1
            print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        print(f"{failed} of {len(chosen)} cases failed", file=sys.stderr)
    return Report("kernels", device_name(setting.device), rows + setting.ceilings())


def summary(rows: list[Row]) -> list[str]:
    """A line a kernel: rows within their limit, part of the copy bandwidth, and rivals' geometric mean and least."""
    lines: list[str] = []
    kernels = dict.fromkeys(row["kernel"].split()[0] for row in rows if "of_copy" in row)
    for kernel in kernels:
        mine = [row for row in rows if row["kernel"].split()[0] == kernel and "of_copy" in row]
        parts = [f"{kernel}: {len(mine)} rows"]
        limited = [row for row in mine if row["ok"] is not None]
        if limited:
            parts.append(f"{sum(row['ok'] for row in limited)} of {len(limited)} within the limit")
        parts.append(f"of copy {min(row['of_copy'] for row in mine):.2f} to {max(row['of_copy'] for row in mine):.2f}")
        for rival in dict.fromkeys(name for row in mine for name in row if name.startswith("x_")):
            ratios = [row[rival] for row in mine if rival in row]
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
            parts.append(f"{rival[2:]} {mean:.2f} times as long in the mean, {min(ratios):.2f} at the least")
        lines.append(", ".join(parts))
        for row in limited:
            if not row["ok"]:
                where = ", ".join(f"{key} {row[key]}" for key in ("hidden", "rank", "batch", "dist") if key in row)
                lines.append(f"  over the limit: {row['kernel']}, {where}: {row['us']:.2f} of {row['limit_us']:.2f} us")
    return lines


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda text: tuple(text.split(",")), default=OPS, help=f"of {', '.join(OPS)}")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b", help="model of groups, steps and more")
    for name, text in (("batch", "decode batches"), ("rank", "ranks"), ("hidden", "widths")):
        parser.add_argument(f"--{name}", type=_numbers, help=f"{text} of expand and shrink, comma separated")
    parser.add_argument(
        "--rival",
        type=Rival.parse,
        action="append",
        default=[],
        metavar="[OP=]MODULE:FUNCTION",
        help="also time this in place of bgmv_expand (or shrink=...: bgmv_shrink); a path to a .py file will do",
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--workers", type=int, default=default_workers() if on_gpu else 0, help="compile beforehand in")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(OPS):
        parser.error(f"--ops {', '.join(sorted(unknown))}: choose from {', '.join(OPS)}")
    grid = TINY if arguments.shape == "tiny" else FULL
    given = {name: getattr(arguments, name) for name in ("batch", "rank", "hidden") if getattr(arguments, name)}
    spec = ModelSpec.from_config(SHAPES[arguments.shape], arguments.shape)
    report = run(arguments.ops, replace(grid, **given), spec, tuple(arguments.rival), arguments.workers)
    report.write(arguments.json)
    print("\n".join(["", *summary(report.rows)]))


if __name__ == "__main__":
    main()

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
import hashlib
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernel_grid import FULL, TINY
from benchmarks.kernel_setting import KernelSetting
from benchmarks.lora_work import LoraWork
from benchmarks.precompile import default_workers, precompile
from benchmarks.report import device_name
from benchmarks.synthetic import SHAPES
from benchmarks.timing import Recording, race
from benchmarks.tune_choice import Trial, choose
from benchmarks.tune_problem import OPS, SHARED, Problem, problems
from benchmarks.tune_space import Config, candidates
from benchmarks.tuned_table import Row, key_of, table_path, update_table
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from kernels.op_configs import CONFIGS_DIR, trial_config

_FINALISTS = 4  # of each point, timed once more beside the default


@dataclass(frozen=True, slots=True)
class _Compile:
    """One configuration to be compiled in another process."""

    problem: Problem
    config: tuple[tuple[str, int], ...]

    @property
    def compiled_as(self) -> Hashable:
        return self.problem.op, self.problem.rank, self.config

    def run_once(self, setting: KernelSetting) -> None:
        with trial_config(self.problem.op, dict(self.config)):
            for work in self.problem.works(setting, self.problem.points[0]):
                work.step(0)


class Search:
    """The search for one table key."""

    def __init__(self, problem: Problem, setting: KernelSetting) -> None:
        self._problem, self._setting = problem, setting
        self._works: dict[int, list[LoraWork]] = {}

    def run(self) -> list[Row]:
        """The table's rows for this key: one a batch, or none."""
        problem = self._problem
        configs = candidates(problem.op, problem.hidden, problem.rank)
        bits = [self._digest(config) for config in configs]
        if bits[0] is None:
            raise RuntimeError(f"{problem}: the default configuration {configs[0]} is wrong")
        right = [index for index, digest in enumerate(bits) if digest is not None]
        times = self._times([configs[index] for index in right], 3)
        trials = [Trial(problem.op, configs[i], str(bits[i]), us) for i, us in zip(right, times, strict=True)]
        finalists = self._finalists(trials)
        times = self._times([trial.config for trial in finalists], 15)
        again = [replace(trial, us=us) for trial, us in zip(finalists, times, strict=True)]
        chosen = choose(again[1:], again[0], problem.mixed)
        if chosen is None:
            return []
        rows: dict[int, Row] = {}
        for index, trial in enumerate(chosen):
            batch = problem.batch(problem.points[index])
            row = {"op": problem.op, "hidden": problem.hidden, "rank": problem.rank, "batch": batch}
            us, default_us = (round(what.us[index], 3) for what in (trial, again[0]))
            rows.setdefault(batch, row | {"config": trial.config, "us": us, "default_us": default_us})
        return list(rows.values())

    def _finalists(self, trials: list[Trial]) -> list[Trial]:
        """The default, then the best of each point among the orders that the default has or a first choice takes."""
        default = trials[0]
        chosen = choose(trials[1:], default, self._problem.mixed) or [default]
        orders = {default.order, *(trial.order for trial in chosen)}
        able = [trial for trial in trials[1:] if trial.order in orders]
        best = [
            sorted(able, key=lambda trial, point=point: trial.us[point])[:_FINALISTS]
            for point in range(len(default.us))
        ]
        return [
            default,
            *{id(trial): trial for group in [chosen, *best] for trial in group if trial is not default}.values(),
        ]

    def _digest(self, config: Config) -> str | None:
        """A digest of what the configuration computes at the largest point; None when it fails or is wrong."""
        digest = hashlib.sha256()
        try:
            with trial_config(self._problem.op, config):
                for work in self._at(len(self._problem.points) - 1):
                    work.check(lambda work=work: work.step(0))
                    result = work.result(lambda work=work: work.step(0))
                    digest.update(result.view(torch.uint8).cpu().numpy().tobytes())
        except Exception as error:
            lines = str(error).splitlines()
            print(f"  {config}: {type(error).__name__}: {lines[0] if lines else ''}", file=sys.stderr)
            return None
        return digest.hexdigest()

    def _times(self, configs: list[Config], repeats: int) -> list[tuple[float, ...]]:
        """Microseconds of each configuration at each point, configurations in turns."""
        setting = self._setting
        columns: list[list[float]] = []
        for point in range(len(self._problem.points)):
            works = self._at(point)
            steps = min(setting.steps(work.moved, work.flops) for work in works)

            def step(index: int, works: list[LoraWork] = works) -> None:
                for work in works:
                    work.step(index)

            recordings: dict[str, Recording] = {}
            for number, config in enumerate(configs):
                with trial_config(self._problem.op, config):
                    recordings[str(number)] = Recording(step, setting.device, steps)
            resident = [tensor for work in works for tensor in work.resident]
            columns.append(list(race(recordings, repeats, setting.cold(*resident)).values()))
        return list(zip(*columns, strict=True))

    def _at(self, point: int) -> list[LoraWork]:
        if point not in self._works:
            self._works[point] = self._problem.works(self._setting, self._problem.points[point])
        return self._works[point]


@torch.inference_mode()
def tune(todo: list[Problem], workers: int, seconds: float, path: Path) -> list[Row]:
    """Search every problem, op by op, and update the table after each; stops after ``seconds``. Returns new rows."""
    deadline = time.monotonic() + seconds
    setting: KernelSetting | None = None
    new: list[Row] = []
    for op in dict.fromkeys(problem.op for problem in todo):
        mine = [problem for problem in todo if problem.op == op]
        if workers and time.monotonic() < deadline:
            jobs = [
                _Compile(problem, tuple(config.items()))
                for problem in mine
                for config in candidates(op, problem.hidden, problem.rank)
            ]
            print(f"{op}: compiled {len(jobs)} configurations in {precompile(jobs, workers):.1f} s", flush=True)
        setting = setting or KernelSetting()
        for problem in mine:
            name = f"{op} hidden {problem.hidden} rank {problem.rank}"
            if time.monotonic() > deadline:
                print(f"{name}: not reached in {seconds:.0f} s", flush=True)
                continue
            rows = Search(problem, setting).run()
            new += rows
            update_table(path, _table_name(setting), rows, {(op, problem.hidden, problem.rank)})
            for row in rows:
                print(
                    f"{name} batch {row['batch']}: {row['config']} {row['us']} us, default {row['default_us']}",
                    flush=True,
                )
            if not rows:
                print(f"{name}: the default", flush=True)
    return new


def _table_name(setting: KernelSetting) -> str:
    return device_name(setting.device) if setting.device.type == "cuda" else "cpu"


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

"""The search over launch configurations."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.common.report import device_name
from benchmarks.common.timing import Recording, race
from benchmarks.kernels.lora_work import LoraWork
from benchmarks.kernels.precompile import precompile
from benchmarks.kernels.setting import KernelSetting
from benchmarks.tune.choice import Trial, choose
from benchmarks.tune.problem import Problem
from benchmarks.tune.space import Config, candidates
from benchmarks.tune.table import Row, update_table
from kernels.op_configs import trial_config

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

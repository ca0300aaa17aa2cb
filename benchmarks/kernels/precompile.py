"""Compiles Triton kernels in many processes at once, by running them, so that Triton's cache on disk is warm.

A kernel takes about a second to compile and each process compiles one at a time; a benchmark or a search over launch
configurations needs hundreds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from typing import Protocol

from benchmarks.kernels.setting import KernelSetting

MOST_WORKERS = 12  # each holds a CUDA context and some tensors


class Runnable(Protocol):
    """What can be sent to another process and run there."""

    @property
    def compiled_as(self) -> Hashable: ...

    def run_once(self, setting: KernelSetting) -> None: ...


def precompile(jobs: Sequence[Runnable], workers: int) -> float:
    """Run every job once, in ``workers`` fresh processes; returns the seconds that took.

    Jobs that are ``compiled_as`` the same go to one process, one after the other. A job that fails says so on stderr
    and nothing else happens: what really needs it will fail again, where it is needed.
    """
    started = time.perf_counter()
    batches: dict[Hashable, list[Runnable]] = {}
    for job in jobs:
        batches.setdefault(job.compiled_as, []).append(job)
    with ProcessPoolExecutor(min(workers, max(1, len(batches))), get_context("spawn")) as pool:
        futures = {pool.submit(_run_all, batch): key for key, batch in batches.items()}
        for future in as_completed(futures):
            for line in future.result():
                print(f"not compiled: {line}", file=sys.stderr, flush=True)
    return time.perf_counter() - started


def default_workers() -> int:
    """One for each core, as far as a GPU's memory holds them."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


@lru_cache
def _setting() -> KernelSetting:
    return KernelSetting(measured=False)


def _run_all(jobs: list[Runnable]) -> list[str]:
    """Run in this process; returns what failed."""
    failed: list[str] = []
    for job in jobs:
        try:
            job.run_once(_setting())
        except Exception as error:
            lines = str(error).splitlines()
            failed.append(f"{job}: {type(error).__name__}: {lines[0] if lines else ''}")
    return failed

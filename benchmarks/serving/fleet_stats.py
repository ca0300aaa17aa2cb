"""What the engines of a running server count, read over its Serve handle by a process of its own.

A process of its own, because connecting to a Ray cluster is for once: the benchmark goes on to the next one.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.report import Row

ROOT = Path(__file__).parents[2]
COUNTED = ("generated_tokens", "prompt_tokens", "slot_hits", "slot_misses", "prefetches", "preemptions")


@dataclass(frozen=True, slots=True)
class Reading:
    """at: ``time.perf_counter``. replicas: name -> its counters, see ``EngineStats``, and ``running``."""

    at: float
    replicas: Mapping[str, Mapping[str, int]]


class FleetStats:
    """Connected to the cluster at ``gcs_address`` until ``close``."""

    def __init__(self, gcs_address: str, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks.serving.fleet_stats import main; main()", gcs_address],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Reading:
        """The counters of now, some milliseconds later. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that reads the engines' statistics has ended")
        return Reading(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def between(first: Reading, last: Reading) -> Row:
    """What the engines did from one reading to another: of all replicas, and of each by name.

    engine_tok_s: generated tokens a second. loads: copies to slots. hit_rate: share of the requests on adapters for
    which nothing was copied; one that follows while a copy is under way counts among them.
    """
    seconds = last.at - first.at
    nothing = dict.fromkeys(COUNTED, 0)
    names = sorted(last.replicas)
    did = [
        {name: last.replicas[one][name] - first.replicas.get(one, nothing)[name] for name in COUNTED} for one in names
    ]
    every = {name: sum(one[name] for one in did) for name in COUNTED}
    return {
        "engine_tok_s": every["generated_tokens"] / seconds,
        "hit_rate": hit_rate(every),
        "loads": every["slot_misses"],
        "preemptions": every["preemptions"],
        "running": [last.replicas[one]["running"] for one in names],
        "replica_tok_s": [one["generated_tokens"] / seconds for one in did],
        "replica_hit_rate": [hit_rate(one) for one in did],
        "replica_loads": [one["slot_misses"] for one in did],
    }


def hit_rate(did: Mapping[str, int]) -> float | None:
    """None when nobody asked for an adapter. A copy ahead of a request's turn is a miss, and its request then a hit."""
    asked = did["slot_hits"] + did["slot_misses"] - did["prefetches"]
    return max(1 - did["slot_misses"] / asked, 0.0) if asked > 0 else None


def main() -> None:
    """The process: answers every line with one reading."""
    import ray  # noqa: PLC0415 (the benchmark itself needs no Ray)
    from ray import serve  # noqa: PLC0415

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    handle: Any = serve.get_app_handle("lorafleet")
    kept = (*COUNTED, "running")
    for _ in sys.stdin:
        stats: Sequence[Mapping[str, Any]] = handle.fleet_stats.remote().result(timeout_s=60)
        replicas = {one["replica"]: {name: one[name] for name in kept} for one in stats}
        print(json.dumps({"at": time.perf_counter(), "replicas": replicas}), flush=True)

"""How soon every router knows of a change at a replica, and what the hub and a router spend on it.

    python -m benchmarks.news
    python -m benchmarks.news --replicas 64 --routers 16 --changes 20 --json news.json

A hub as Serve runs it, in a Ray instance of this machine alone; replicas and routers are the real publishers and
readers, a few processes of them, without engines. In each replica ``--changes`` adapters a second come to a slot and
put out others, and its load changes as often; each has ``--keys`` adapters in host memory. The delay is that of the
oldest change in each answer that a router gets, so the others are younger. ``new_router`` is one that starts then.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from benchmarks.common.report import Report, Row, device_name
from benchmarks.news.fleet import Listeners, Talkers
from deployments.hub import FleetHub

PROCESSES = 2  # that the replicas share, and the routers one more
SETTLE_SECONDS = 2.0


def measure(replicas: int, routers: int, changes: float, keys: int, seconds: float) -> Row:
    """One row."""
    hub: Any = ray.remote(FleetHub).options(num_cpus=0, max_concurrency=1000).remote()
    pid: Any = ray.get(hub.__ray_call__.remote(lambda _: os.getpid()))
    names = [f"replica-{number}" for number in range(replicas)]
    actor: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 10}
    talkers: list[Any] = [
        ray.remote(Talkers).options(**actor).remote(hub, names[part::PROCESSES], keys, changes)
        for part in range(PROCESSES)
    ]
    listeners: Any = ray.remote(Listeners).options(**actor).remote(hub, names, routers)
    talking = [talker.talk.remote(seconds + 2 * SETTLE_SECONDS, SETTLE_SECONDS) for talker in talkers]
    hearing = listeners.hear.remote(seconds, 2 * SETTLE_SECONDS)
    hub_process = psutil.Process(pid)
    before = sum(hub_process.cpu_times()[:2])
    delays, answers, heard_s = ray.get(hearing)
    hub_s = sum(hub_process.cpu_times()[:2]) - before
    size, took_s = ray.get(listeners.begin.remote())
    told = ray.get(talking)
    for made in (*talkers, listeners, hub):
        ray.kill(made)
    delay = np.percentile(np.array(delays) * 1e3, [50, 90, 99]) if delays else [float("nan")] * 3
    return {
        "replicas": replicas,
        "routers": routers,
        "changes_s": changes * replicas,
        "keys": keys,
        "delay_ms_p50": float(delay[0]),
        "delay_ms_p90": float(delay[1]),
        "delay_ms_p99": float(delay[2]),
        "published_s": sum(count for count, _ in told) / (seconds + 2 * SETTLE_SECONDS),
        "answers_s": answers / seconds,
        "hub_cpu": hub_s / (seconds + 2 * SETTLE_SECONDS),
        "router_cpu": heard_s / seconds / routers,
        "replica_cpu": sum(used for _, used in told) / (seconds + 2 * SETTLE_SECONDS) / replicas,
        "new_router_kib": size / 1024,
        "new_router_ms": took_s * 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.news", description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--routers", type=int, default=8)
    parser.add_argument("--changes", type=float, default=10.0, help="a second, at each replica")
    parser.add_argument("--keys", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        rows = [
            measure(replicas, options.routers, options.changes, options.keys, options.seconds)
            for replicas in options.replicas
        ]
    finally:
        ray.shutdown()
    Report("news", device_name(torch.device("cpu")), rows).write(options.json)


if __name__ == "__main__":
    main()

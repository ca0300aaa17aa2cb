"""A fleet of many replicas and adapters, simulated: our placement beside other ways to route.

python -m benchmarks.fleet_sim --json fleet_sim.json                        # 100 replicas, 20 000 adapters
python -m benchmarks.fleet_sim --replicas 1,10,100 --zipf 0.8,1.0,1.2,1.5
python -m benchmarks.fleet_sim --replicas 1000 --adapters 100000 --policies placement
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adapter_store.eviction import EVICTION_NAMES, eviction_policy
from benchmarks.common.options import some_of
from benchmarks.common.report import Report, Row, device_name
from benchmarks.fleet_sim.optimum import best_placement, clairvoyant
from benchmarks.fleet_sim.ours import Placement
from benchmarks.fleet_sim.policies import RoutingPolicy
from benchmarks.fleet_sim.replica import ReplicaShape
from benchmarks.fleet_sim.rivals import ConsistentHash, PowerOfTwo, RandomChoice, ServeMultiplex
from benchmarks.fleet_sim.service_times import measured
from benchmarks.fleet_sim.simulation import Failure, Outcome, Simulation
from benchmarks.fleet_sim.traffic import Traffic, gamma_traffic
from deployments.routing.placement_policy import PlacementPolicy
from engine.settings import EngineSettings

POLICIES = ("placement", "consistent_hash", "serve_multiplex", "power_of_two", "random")


@dataclass(frozen=True, slots=True)
class Case:
    """One fleet and its traffic."""

    replicas: int
    adapters: int
    zipf: float
    rate: float  # requests a second for each replica
    seconds: float
    warm: float  # seconds at the beginning that do not count
    shape: float
    tokens: float
    failures: int
    seed: int

    def traffic(self) -> Traffic:
        return gamma_traffic(
            self.adapters, self.zipf, self.rate * self.replicas, self.seconds, self.shape, self.tokens, self.seed
        )

    def deaths(self) -> tuple[Failure, ...]:
        """Evenly over the time that counts."""
        step = (self.seconds - self.warm) / (self.failures + 1)
        return tuple(Failure(self.warm + step * (one + 1), one % (self.replicas - 1)) for one in range(self.failures))


def simulate(case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each policy, all under the same requests."""
    shape = ReplicaShape(slots=arguments.slots, host_adapters=arguments.host_adapters)
    times = measured(shape.max_rows)
    traffic = case.traffic()
    counted = traffic.times >= case.warm
    slots = shape.slots * case.replicas
    bounds = {
        "optimal_hit_rate": best_placement(traffic.adapters[counted], slots),
        "clairvoyant_hit_rate": clairvoyant(traffic.adapters, slots, int(counted.argmax())),
    }
    for name in arguments.policies:
        begun = time.process_time()
        policy, eviction = _policy(name, arguments, case.seed), eviction_policy(arguments.eviction)
        simulation = Simulation(policy, case.replicas, arguments.routers, shape, times, eviction, case.seed)
        outcome = simulation.run(traffic, case.deaths())
        yield {
            "policy": name,
            "replicas": case.replicas,
            "adapters": case.adapters,
            "zipf": case.zipf,
            "failures": case.failures,
            "eviction": arguments.eviction,
            **figures(case, traffic, outcome, bounds),
            "cpu_s": time.process_time() - begun,
        }


def figures(case: Case, traffic: Traffic, outcome: Outcome, bounds: Row) -> Row:
    """What is reported of one run: of the requests that came after the warm-up and were answered."""
    counted = traffic.times >= case.warm
    answered = counted & np.isfinite(outcome.first_tokens)
    first = outcome.first_tokens[answered]
    loads = sum(case.warm <= when < case.seconds for when in outcome.load_times)
    return {
        "hit_rate": float(outcome.hits[answered].mean()),
        **bounds,
        "loads_per_min": loads / (case.seconds - case.warm) * 60,
        "ttft_p50_ms": float(np.percentile(first, 50)) * 1e3,
        "ttft_p99_ms": float(np.percentile(first, 99)) * 1e3,
        "fairness": jain(traffic.adapters[answered], first),
        "decision_us": float(np.median(outcome.decision_s)) * 1e6,
        "decision_us_mean": float(np.mean(outcome.decision_s)) * 1e6,
        "busy": outcome.busy,
        "requests": int(counted.sum()),
        "answered": int(answered.sum()),
        "tries": outcome.tries,
        "lost": outcome.lost,
    }


def jain(tenants: np.ndarray, first_tokens: np.ndarray) -> float:
    """Jain's index over tenants, each the owner of one adapter, of how fast they are served: 1 / mean time to first
    token. 1.0: all alike.
    """
    _, of = np.unique(tenants, return_inverse=True)
    speeds = np.bincount(of) / np.bincount(of, first_tokens)
    return float(speeds.sum() ** 2 / (len(speeds) * (speeds**2).sum()))


def _policy(name: str, arguments: argparse.Namespace, seed: int) -> RoutingPolicy:
    routers = arguments.routers
    made: dict[str, Callable[[], RoutingPolicy]] = {
        "placement": lambda: Placement(
            routers, arguments.report_ms / 1e3, arguments.news_ms / 1e3, PlacementPolicy(**dict(arguments.set))
        ),
        "random": lambda: RandomChoice(routers, seed),
        "power_of_two": lambda: PowerOfTwo(routers, seed),
        "serve_multiplex": lambda: ServeMultiplex(routers, seed),
        "consistent_hash": lambda: ConsistentHash(routers, seed),
    }
    return made[name]()


def main() -> None:
    """Parse the command line, simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=_integers, default="100")
    parser.add_argument("--adapters", type=int, default=20_000)
    parser.add_argument("--zipf", type=_numbers, default="1.0")
    parser.add_argument(
        "--policies", type=some_of(POLICIES), default=",".join(POLICIES), help=f"of {', '.join(POLICIES)}"
    )
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second for each replica")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--warm", type=float, default=300.0, help="seconds at the beginning that do not count")
    parser.add_argument("--shape", type=float, default=0.5, help="of the Gamma times between an adapter's requests")
    parser.add_argument("--tokens", type=float, default=128.0, help="of an answer, the mean")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host-adapters", type=int, default=256)
    parser.add_argument("--eviction", choices=EVICTION_NAMES, default=EngineSettings(model="any").eviction)
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--report-ms", type=float, default=50.0)
    parser.add_argument("--news-ms", type=float, default=10.0)
    parser.add_argument("--set", type=_setting, action="append", default=[], help="routing setting=value, of ours")
    parser.add_argument("--failures", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("fleet_sim", f"{device_name(torch.device('cpu'))}", [])
    for replicas in arguments.replicas:
        for zipf in arguments.zipf:
            case = Case(
                replicas, arguments.adapters, zipf, arguments.rate, arguments.seconds, arguments.warm, arguments.shape,
                arguments.tokens, arguments.failures, arguments.seed,
            )  # fmt: skip
            for row in simulate(case, arguments):
                report.rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    report.write(arguments.json)


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def _integers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


if __name__ == "__main__":
    main()

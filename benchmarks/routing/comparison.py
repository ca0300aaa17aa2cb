"""What one run of one router comes to, and several runs together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.percentile import percentile
from benchmarks.common.report import Row
from benchmarks.routing.policies import Policy
from benchmarks.routing.traffic import Outcome

COUNTED = ("asked", "found", "loads", "fetched")


@dataclass(frozen=True, slots=True)
class Run:
    """One repetition with one router: what clients saw, and what the replicas counted meanwhile."""

    policy: Policy
    repetition: int
    outcomes: Sequence[Outcome]
    counted: Mapping[str, Mapping[str, int]]  # replica -> COUNTED
    processor_s: Mapping[str, float]  # kind of process -> what it spent
    seconds: float

    def row(self) -> Row:
        """See ``row``."""
        return row(str(self.repetition), [self])


def counted(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """What every replica counted between two looks."""
    first = {one["replica"]: one for one in before}
    return {
        one["replica"]: {name: one[name] - first.get(one["replica"], {}).get(name, 0) for name in COUNTED}
        for one in after
    }


def row(label: str, runs: Sequence[Run]) -> Row:
    """Runs of one router as one. hit_rate: share of the requests that found their adapter in a slot when they came to
    their replica. loads: adapters copied to slots; of those, fetched: had to come from their source first; both
    the mean of the runs. Times are those of all requests, p99 also the median of the runs'. busiest: requests of the
    busiest replica over the mean. cores: processors taken, by kind of process."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    whole = [outcome for outcome in outcomes if outcome.whole]
    total = {name: sum(one[name] for run in runs for one in run.counted.values()) for name in COUNTED}
    busiest = [max(one["asked"] for one in run.counted.values()) for run in runs]
    means = [sum(one["asked"] for one in run.counted.values()) / len(run.counted) for run in runs]
    return {
        "policy": runs[0].policy.value,
        "repetition": label,
        "requests": len(outcomes),
        "errors": len(outcomes) - len(whole),
        "exact": sum(outcome.exact for outcome in whole),
        "hit_rate": total["found"] / total["asked"] if total["asked"] else None,
        "loads": total["loads"] / len(runs) if len(runs) > 1 else total["loads"],
        "fetched": total["fetched"] / len(runs) if len(runs) > 1 else total["fetched"],
        "ttft_ms_p50": percentile((outcome.answer.ttft_ms for outcome in whole), 0.5),
        "ttft_ms_p99": percentile((outcome.answer.ttft_ms for outcome in whole), 0.99),
        "ttft_ms_p99_median": statistics.median(
            percentile((one.answer.ttft_ms for one in run.outcomes if one.whole), 0.99) or 0.0 for run in runs
        ),
        "total_ms_p50": percentile((outcome.answer.total_ms for outcome in whole), 0.5),
        "total_ms_p99": percentile((outcome.answer.total_ms for outcome in whole), 0.99),
        "busiest": sum(busiest) / sum(means) if sum(means) else None,
        **{
            f"{kind}_cores": sum(run.processor_s[kind] for run in runs) / sum(run.seconds for run in runs)
            for kind in sorted(runs[0].processor_s)
        },
        "late_ms_p99": percentile(((one.answer.sent - one.answer.due) * 1e3 for one in outcomes), 0.99),
    }


def together(runs: Sequence[Run]) -> list[Row]:
    """One row a router: percentiles over the requests of all repetitions, loads as their mean."""
    return [row("all", mine) for policy in Policy if (mine := [run for run in runs if run.policy is policy])]


def verdict(rows: Sequence[Row]) -> list[str]:
    """How our router stands to the others, in a line each."""
    by_policy = {one["policy"]: one for one in rows if one["repetition"] == "all"}
    p99 = {(one["policy"], one["repetition"]): one["ttft_ms_p99"] for one in rows}
    repetitions = [one["repetition"] for one in rows if one["policy"] == Policy.OURS and one["repetition"] != "all"]
    ours = by_policy.pop(Policy.OURS.value, None)
    if ours is None:
        return []
    return [
        f"against {name}: {len(repetitions) * ours['loads']:.0f} to {len(repetitions) * other['loads']:.0f} loads, "
        f"{100 * (1 - ours['loads'] / other['loads']):.1f} % fewer, "
        f"hit rate {ours['hit_rate']:.3f} to {other['hit_rate']:.3f}, "
        f"{100 * (1 - ours['fetched'] / max(other['fetched'], 1)):.0f} % fewer from their source, "
        f"TTFT p99 (median of repetitions) {ours['ttft_ms_p99_median']:.0f} to {other['ttft_ms_p99_median']:.0f} ms, "
        + " ".join(f"{p99[Policy.OURS, one] / p99[name, one]:.2f}" for one in repetitions)
        + " times that of the same repetition"
        for name, other in by_policy.items()
        if other["loads"]
    ]

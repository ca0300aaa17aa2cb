"""The simulation of a fleet: its parts against what is known of them, and the whole as a user runs it, tiny."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from adapter_store.eviction import LeastRecentlyUsed
from benchmarks.fleet_sim import __main__ as fleet_sim
from benchmarks.fleet_sim.optimum import best_placement, clairvoyant
from benchmarks.fleet_sim.replica import ReplicaShape, Request, SimReplica
from benchmarks.fleet_sim.rivals import ConsistentHash
from benchmarks.fleet_sim.service_times import RESULTS, measured
from benchmarks.fleet_sim.traffic import gamma_traffic
from benchmarks.plot.draw import save

TINY = ("--replicas", "4", "--adapters", "400", "--slots", "16", "--seconds", "12", "--warm", "4", "--rate", "20")


@pytest.fixture(scope="module")
def times():
    return measured(64)


def run_sim(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fleet_sim", *arguments])
    fleet_sim.main()


def test_every_policy_has_a_row_and_ours_loads_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fleet_sim.json"
    run_sim(monkeypatch, *TINY, "--json", str(file))
    rows = {row["policy"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == set(fleet_sim.POLICIES)
    for row in rows.values():
        assert 0 < row["hit_rate"] <= row["clairvoyant_hit_rate"] < 1
        assert 0 < row["ttft_p50_ms"] < row["ttft_p99_ms"]
        assert 0 < row["fairness"] <= 1 and row["decision_us"] > 0 and row["lost"] == 0
    assert rows["placement"]["loads_per_min"] < rows["power_of_two"]["loads_per_min"]
    assert rows["placement"]["hit_rate"] > rows["random"]["hit_rate"]
    save(json.loads(file.read_text()), tmp_path / "fleet_sim.png")
    assert (tmp_path / "fleet_sim.png").stat().st_size > 10_000


def test_a_policy_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run_sim(monkeypatch, "--policies", "placement,fastest")
    assert "fastest: choose from placement, " in capsys.readouterr().err


def test_a_replica_that_dies_loses_only_what_had_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fleet_sim.json"
    run_sim(monkeypatch, *TINY, "--failures", "2", "--policies", "placement,consistent_hash", "--json", str(file))
    for row in json.loads(file.read_text())["rows"]:
        assert 0 < row["requests"] - row["answered"] <= row["lost"] <= 2 * 64  # some had come before what is counted


def test_service_times_are_those_of_the_result_files(times) -> None:
    decoded = json.loads((RESULTS / "decode-h100.json").read_text())["rows"]
    steps = {(row["mode"], row["batch"]): row["step_ms_p50"] / 1e3 for row in decoded}
    for batch in (8, 32, 64):
        assert times.steps[batch][batch] == pytest.approx(steps["distinct", batch])
        assert times.steps[batch][1] == pytest.approx(steps["identical", batch])
        assert times.steps[batch][0] == pytest.approx(steps["base", batch])
        assert times.steps[batch][1] < times.steps[batch][batch // 2] < times.steps[batch][batch]
    churned = {(row["mode"], row["case"]): row for row in json.loads((RESULTS / "churn-h100.json").read_text())["rows"]}
    first = times.prefill + times.busy_steps * churned["arrivals", "resident"]["itl_ms_p50"] / 1e3
    for extra, case in ((0.0, "resident"), (times.from_host, "host"), (times.from_host + times.from_disk, "disk")):
        assert first + extra == pytest.approx(churned["arrivals", case]["ttft_ms_p50"] / 1e3)


def test_one_replica_answers_as_the_measured_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine's own run with random arrivals, twice as many adapters as slots, most of them in host memory."""
    churned = json.loads((RESULTS / "churn-h100.json").read_text())["rows"]
    file = tmp_path / "fleet_sim.json"
    one = ("--replicas", "1", "--rate", "20", "--tokens", "64", "--shape", "1", "--slots", "40", "--seconds", "90",
           "--warm", "40", "--policies", "placement")  # fmt: skip
    for case, adapters in (("resident", 40), ("churn", 80)):
        run_sim(monkeypatch, *one, "--adapters", str(adapters), "--json", str(file))
        (row,) = json.loads(file.read_text())["rows"]
        (engine,) = (row for row in churned if (row["mode"], row["case"]) == ("poisson", case))
        assert row["ttft_p50_ms"] == pytest.approx(engine["ttft_ms_p50"], rel=0.15)
        assert row["ttft_p99_ms"] == pytest.approx(engine["ttft_ms_p99"], rel=0.3)


def replica(times, **shape):
    return SimReplica("one", ReplicaShape(**shape), times, LeastRecentlyUsed())


def run_out(one: SimReplica) -> list[tuple[float, Request]]:
    done = []
    while (now := one.next_event()) < np.inf:
        done += [(now, request) for request in one.advance(now)]
    return done


def test_a_lone_request_takes_its_load_its_prompt_and_its_steps(times) -> None:
    one = replica(times)
    one.accept(Request(0, "x", 11, 0.0), 0.0)
    ((end, request),) = run_out(one)
    loaded = times.from_disk + times.from_host
    assert request.first == pytest.approx(loaded + times.prefill + times.idle_steps * times.steps[1][1])
    assert end == pytest.approx(loaded + times.prefill + 10 * times.steps[1][1])
    one.accept(Request(1, "x", 1, end), end)
    assert one.loads == 1 and run_out(one)[0][1].first < end + 2 * times.prefill + 2 * times.steps[1][1]


def test_slots_are_kept_while_used_and_requests_wait_for_one(times) -> None:
    one = replica(times, slots=1)
    for number, adapter in enumerate("xyx"):
        one.accept(Request(number, adapter, 5, 0.0), 0.0)
    assert one.unreferenced() == 0 and set(one.slots) == {"x"}
    done = [request.number for _, request in run_out(one)]
    assert done == [0, 2, 1] and one.loads == 2 and set(one.slots) == {"y"} and list(one.host) == ["x", "y"]
    assert one.take_changes() == ((["y"], []), (["x", "y"], []))


def test_no_more_rows_run_than_a_step_holds(times) -> None:
    one = replica(times, max_rows=2, max_waiting=1)
    for number in range(3):
        assert not one.full
        one.accept(Request(number, "x", 5, 0.0), 0.0)
    assert one.full
    run_out_rows = []
    while (now := one.next_event()) < np.inf:
        one.advance(now)
        run_out_rows.append(one.running)
    assert max(run_out_rows) == 2 and one.count == 0


def test_traffic_has_the_rate_the_popularity_and_the_bursts_asked_for() -> None:
    calm, bursty = (gamma_traffic(50, 1.0, 400.0, 100.0, shape, 32.0, seed=3) for shape in (1.0, 0.2))
    for traffic in (calm, bursty):
        assert len(traffic.times) == pytest.approx(40_000, rel=0.1)
        assert (np.diff(traffic.times) >= 0).all() and traffic.tokens.mean() == pytest.approx(32, rel=0.05)
        counts = np.sort(np.bincount(traffic.adapters, minlength=50))[::-1]
        assert counts[0] / counts[9] == pytest.approx(10, rel=0.3)
    gaps = [np.diff(t.times[t.adapters == np.bincount(t.adapters).argmax()]) for t in (calm, bursty)]
    variations = [(gap.std() / gap.mean()) ** 2 for gap in gaps]
    assert variations == pytest.approx([1.0, 5.0], rel=0.15)


def test_no_cache_beats_the_clairvoyant_one_and_no_placement_the_best() -> None:
    adapters = np.array([0, 1, 0, 2, 0, 1, 3, 0, 1, 2])
    assert best_placement(adapters, 2) == 0.7  # 0 and 1
    assert clairvoyant(adapters, 2, 0) == 0.3  # 0 alone: all else is asked for later than it each time
    assert clairvoyant(adapters, 4, 0) == 0.6 and clairvoyant(adapters, 4, 7) == 1.0


def test_the_ring_is_rays_own() -> None:
    from ray.serve.experimental import consistent_hash_router as ray_ring

    from benchmarks.fleet_sim import rivals

    assert rivals._hash("x:1") == ray_ring._hash_bytes(b"x:1")
    assert (rivals.VIRTUAL_NODES, rivals.FALLBACKS) == (
        ray_ring.DEFAULT_NUM_VIRTUAL_NODES, ray_ring.DEFAULT_NUM_FALLBACK_REPLICAS,
    )  # fmt: skip
    ring = ConsistentHash(1, 0)
    ring.replicas_are([SimReplica(name, ReplicaShape(), measured(64), LeastRecentlyUsed()) for name in "abcd"])
    assert len(set(ring.choose(0, "x", frozenset(), 0.0))) == 3

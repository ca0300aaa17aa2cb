"""Open-loop load: its arrivals, lengths and arithmetic, and one short run against the real server."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.lengths import Lengths
from benchmarks.common.open_loop import offer
from benchmarks.common.workload import Arrival, Workload
from benchmarks.plot.serving import ServingResults
from benchmarks.serving import __main__ as serving
from benchmarks.serving.answer import Answer
from benchmarks.serving.client import Job
from benchmarks.serving.fleet_stats import Reading, between
from benchmarks.serving.prompt_text import PromptText, words
from benchmarks.serving.served_models import ServedModels
from benchmarks.serving.slo import Slo

FOUR = Workload(("a", "b", "c", "d"), 1.0, Lengths(64, 0.6, 4, 256), Lengths(32, 0.6, 4, 128))


def answer(due: float, *events: float, tokens: int | None = None, error: str | None = None) -> Answer:
    return Answer(due, due, events, events[-1] if events else due, 10, len(events) if tokens is None else tokens, error)


def test_arrivals_are_poisson() -> None:
    arrivals = FOUR.arrivals(50.0, 200.0, seed=1)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 200
    assert len(times) == pytest.approx(10_000, rel=0.03)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05), "exponential: as far apart as their mean"
    assert sum(gap > 3 / 50 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-3), rel=0.15)


def test_adapters_are_drawn_by_zipf() -> None:
    arrivals = FOUR.arrivals(100.0, 100.0, seed=2)
    shares = [sum(arrival.model == name for arrival in arrivals) / len(arrivals) for name in FOUR.models]
    assert shares == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25], abs=0.02)
    even = Workload(FOUR.models, 0.0, FOUR.prompt, FOUR.output).arrivals(100.0, 100.0, seed=2)
    assert [sum(a.model == name for a in even) / len(even) for name in FOUR.models] == pytest.approx(
        [0.25] * 4, abs=0.02
    )


def test_the_seed_decides_everything() -> None:
    assert FOUR.arrivals(5.0, 10.0, seed=3) == FOUR.arrivals(5.0, 10.0, seed=3)
    assert FOUR.arrivals(5.0, 10.0, seed=3) != FOUR.arrivals(5.0, 10.0, seed=4)
    seeds = [arrival.seed for arrival in FOUR.arrivals(50.0, 10.0, seed=3)]
    assert len(set(seeds)) == len(seeds), "no two prompts alike: a cache of prompts must not help"


def test_lengths_are_lognormal_and_clipped() -> None:
    rng = random.Random(0)
    drawn = [Lengths(64, 0.5, 4, 256).draw(rng) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(64, rel=0.02)
    assert statistics.stdev(map(math.log, drawn)) == pytest.approx(0.5, rel=0.03)
    clipped = [Lengths(64, 2.0, 16, 128).draw(rng) for _ in range(2000)]
    assert (min(clipped), max(clipped)) == (16, 128)
    assert {Lengths(7, 0.0, 1, 9).draw(rng) for _ in range(10)} == {7}


@pytest.mark.parametrize("values", [(64, 0.5, 100, 256), (300, 0.5, 4, 256), (1, 0.5, 0, 2), (8, -1.0, 4, 16)])
def test_lengths_out_of_range_are_refused(values: tuple[float, float, int, int]) -> None:
    with pytest.raises(ValueError, match=r"must (lie within|be 0 or more)"):
        Lengths(*values)


async def test_a_late_server_delays_no_arrival() -> None:
    arrivals = [Arrival(0.02 * number, "a", 8, 8, number) for number in range(10)]

    async def send(arrival: Arrival, due: float) -> tuple[int, float, float]:
        sent = time.perf_counter()
        await asyncio.sleep(0.5)
        return arrival.seed, due, sent

    start, results = await offer(arrivals, send)
    assert [number for number, _, _ in results] == list(range(10))
    assert [due - start for _, due, _ in results] == pytest.approx([arrival.at for arrival in arrivals])
    assert max(sent for _, _, sent in results) - start < 0.5, "the last was sent before the first was answered"


async def test_a_late_client_counts_from_when_requests_were_due() -> None:
    async def send(arrival: Arrival, due: float) -> Answer:
        sent = time.perf_counter()
        if arrival.seed == 0:
            time.sleep(0.2)  # noqa: ASYNC251 (this process is busy)
        now = time.perf_counter()
        return Answer(due, sent, (now,), now, 1, 1)

    _, (_, second) = await offer([Arrival(0.0, "a", 1, 1, 0), Arrival(0.01, "a", 1, 1, 1)], send)
    assert second.sent - second.due > 0.15
    assert second.ttft_ms > 150


def test_latencies_count_from_the_due_time() -> None:
    late = Answer(10.0, 11.0, (12.0, 12.5, 14.0), 14.5, 20, 6)
    assert (late.ttft_ms, late.total_ms, late.gaps_ms) == (2000.0, 4500.0, [500.0, 1500.0])
    assert late.token_ms == 500.0, "five tokens after the first, the last of them without a text"
    assert answer(0.0, 1.0).token_ms == 0.0


def test_objectives_must_both_be_met() -> None:
    slo = Slo(ttft_ms=1000, itl_ms=100)
    good, slow_start, slow_tokens = answer(0.0, 1.0, 1.09), answer(0.0, 1.01, 1.1), answer(0.0, 0.5, 0.61)
    failed = answer(0.0, 0.1, 0.2, error="HTTP 503")
    assert [slo.met(each) for each in (good, slow_start, slow_tokens, failed)] == [True, False, False, False]


def test_one_rate_summarized() -> None:
    answers = [answer(0.0, 1.0, 1.1), answer(1.0, 1.5, 1.6, 1.8), answer(2.0, 4.0), answer(3.0, error="HTTP 503")]
    row = Slo(1000, 160).summarize(answers, 0.0, 5.0)
    assert (row["requests"], row["errors"], row["attained"], row["goodput_rps"]) == (4, 1, 0.5, 0.4)
    assert (row["ttft_ms_p50"], row["ttft_ms_p99"]) == (1000.0, 2000.0)
    assert row["itl_ms_p50"] == pytest.approx(100.0)
    assert row["itl_ms_p99"] == pytest.approx(200.0)
    assert row["tok_s"] == pytest.approx(6 / 4.0)
    assert row["output_tokens"] == pytest.approx(2.0)
    nothing = Slo(1000, 160).summarize([], 0.0, 5.0)
    assert (nothing["requests"], nothing["attained"], nothing["ttft_ms_p50"], nothing["tok_s"]) == (0, None, None, None)


def test_prompts_come_to_the_wanted_tokens() -> None:
    text = PromptText.fitted((8, 21), (40, 85))
    assert text == PromptText(5.0, 2.0)
    assert len(text.make(65, seed=1).split()) == 30
    assert len(text.make(1, seed=1).split()) == 1
    assert text.make(65, seed=1) == words(30, 1) != words(30, 2)
    with pytest.raises(ValueError, match="nothing to fit"):
        PromptText.fitted((8, 21), (40, 21))


def test_which_models_requests_name() -> None:
    listed = [{"id": "base"}, {"id": "x", "parent": "base"}, {"id": "y", "parent": "base"}]
    models = ServedModels.from_list({"data": listed})
    assert models.chosen(None, None) == ["x", "y"]
    assert models.chosen(1, None) == ["x"]
    assert models.chosen(0, None) == ["base"]
    assert models.chosen(2, "tenant-") == ["tenant-000", "tenant-001"]
    assert ServedModels("base", ()).chosen(None, None) == ["base"]
    with pytest.raises(ValueError, match="lists 2 adapters, not 3"):
        models.chosen(3, None)
    with pytest.raises(ValueError, match="say how many with --adapters"):
        models.chosen(None, "tenant-")
    with pytest.raises(ValueError, match="no base model"):
        ServedModels.from_list({"data": listed[1:]})


def test_what_engines_did_between_two_readings() -> None:
    def counters(tokens: int, hits: int, misses: int, prefetches: int) -> dict[str, int]:
        loads = {"slot_hits": hits, "slot_misses": misses, "prefetches": prefetches}
        return {"generated_tokens": tokens, "prompt_tokens": 0, "preemptions": 0, "running": 3} | loads

    first = Reading(10.0, {"a": counters(100, 10, 10, 0)})
    last = Reading(14.0, {"b": counters(40, 4, 1, 1), "a": counters(300, 16, 12, 0)})
    did = between(first, last)
    assert did["replica_tok_s"] == [50.0, 10.0]
    assert did["engine_tok_s"] == 60.0
    # b: a copy ahead of its request's turn, a miss and then a hit, is one request of which one needed a copy.
    assert did["replica_hit_rate"] == [0.75, 0.75]
    assert (did["loads"], did["replica_loads"], did["hit_rate"]) == (3, [2, 1], 0.75)
    assert between(last, Reading(15.0, last.replicas))["hit_rate"] is None, "nobody asked"


def test_fleets_are_compared_at_their_best_rates() -> None:
    rows: list[dict[str, Any]] = [
        {"replicas": 1, "adapters": 4, "engine_tok_s": 100.0},
        {"replicas": 1, "adapters": 4, "engine_tok_s": 80.0},
        {"replicas": 2, "adapters": 8, "engine_tok_s": 190.0},
    ]
    serving.compare(rows)
    assert [row.get("times_first") for row in rows] == [1.0, None, 1.9]
    rows.append({"replicas": 2, "adapters": 8, "engine_tok_s": 200.0})
    serving.compare(rows)
    assert [row.get("times_first") for row in rows] == [1.0, None, None, 2.0]


def test_clients_share_the_arrivals() -> None:
    arrivals = FOUR.arrivals(20.0, 3.0, seed=5)
    parts = Job("http://x", "chat", 1.0, 2.0, PromptText(0, 1), arrivals).shared(3)
    assert sorted((a for part in parts for a in part.arrivals), key=lambda a: a.at) == arrivals
    assert max(len(part.arrivals) for part in parts) - min(len(part.arrivals) for part in parts) <= 1


@pytest.mark.parametrize(
    "arguments", [["--fleets", "0:4"], ["--set", "engine"], ["--rate", "0"], ["--prompt", "500"], ["--output", "2"]]
)
def test_what_makes_no_sense_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", *arguments])
    with pytest.raises(SystemExit):
        serving.main()


def test_a_run_against_the_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "serving.json", tmp_path / "serving.png"
    options = "--rate 1,2 --duration 4 --replicas 2 --adapters 6 --slots 2 --clients 2 --gateways 2"
    options += " --set engine.max_waiting=32 --output 8 --max-output 16 --timeout-s 60"
    monkeypatch.setattr(sys, "argv", ["serving", *options.split(), f"--json={file}", f"--plot={picture}"])
    serving.main()
    content = json.loads(file.read_text())
    assert content["command"] == f"python -m benchmarks.serving {options}"
    assert [row["rate"] for row in content["rows"]] == [2.0, 4.0], "for each replica"
    for row in content["rows"]:
        names = [f"adapter-{number:03d}" for number in range(6)]
        planned = Workload(names, 1.0, Lengths(64, 0.6, 4, 256), Lengths(8, 0.6, 4, 16)).arrivals(row["rate"], 4.0, 0)
        assert (row["requests"], row["errors"], row["adapters"]) == (len(planned), 0, 6)
        assert row["output_tokens"] == pytest.approx(statistics.fmean(arrival.output_tokens for arrival in planned))
        assert row["prompt_tokens"] == pytest.approx(statistics.fmean(a.prompt_tokens for a in planned), rel=0.25)
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
        assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"]
        assert row["goodput_rps"] == pytest.approx(row["attained"] * row["requests"] / 4.0)
        assert (row["replicas"], row["gateways"]) == (2, 2)
        assert len(row["replica_tok_s"]) == len(row["replica_hit_rate"]) == 2
        assert row["engine_tok_s"] == pytest.approx(sum(row["replica_tok_s"]))
        assert row["engine_tok_s"] * 3.0 <= sum(arrival.output_tokens for arrival in planned) * 1.1
        assert 0 < row["cores_replica"] < 2 * (os.cpu_count() or 1)
    assert content["rows"][-1]["engine_tok_s"] > 0
    assert [row.get("times_first") for row in content["rows"]].count(1.0) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"not a result of benchmarks\.serving"):
        ServingResults(content | {"benchmark": "decode"})

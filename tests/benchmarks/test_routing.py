"""How runs of routers are counted, and what makes a run with a lost node fail."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.plot.draw import draw
from benchmarks.routing.comparison import Run, counted, together, verdict
from benchmarks.routing.far_store import FarStore
from benchmarks.routing.node_loss import account, failures
from benchmarks.routing.policies import Policy
from benchmarks.routing.tenants import Tenants, telling
from benchmarks.routing.traffic import Outcome, Traffic, gateway_lost
from benchmarks.serving.answer import Answer, Ending


def outcome(
    text: str = "abcd", ending: Ending = Ending.WHOLE, ttft: float = 0.1, *, moved: bool = False, expected: str = "abcd"
) -> Outcome:
    events = (ttft,) if text else ()
    error = None if ending is Ending.WHOLE else str(ending)
    return Outcome(Answer(0.0, 0.0, events, 1.0, 4, len(text), error, ending, text), expected, moved)


def test_exact_is_all_of_it_or_the_beginning_of_it() -> None:
    assert outcome().exact
    assert not outcome("abce").exact
    assert not outcome("abc").exact, "said to be whole, and is not"
    assert outcome("abc", Ending.TOLD).exact
    assert not outcome("abx", Ending.TOLD).exact
    assert outcome("", Ending.REFUSED).exact


def test_replicas_are_counted_between_two_looks() -> None:
    before = [{"replica": "a", "asked": 10, "found": 4, "loads": 6, "fetched": 5}]
    after = [
        {"replica": "a", "asked": 16, "found": 8, "loads": 8, "fetched": 6},
        {"replica": "b", "asked": 2, "found": 0, "loads": 2, "fetched": 2},
    ]
    assert counted(before, after) == {
        "a": {"asked": 6, "found": 4, "loads": 2, "fetched": 1},
        "b": {"asked": 2, "found": 0, "loads": 2, "fetched": 2},
    }


TENANTS = Tenants(Path(), {}, 4, {f"tenant-{number}": [("?", "!")] for number in range(20)})


@pytest.mark.parametrize(("shape", "apart"), [(1.0, 1.0), (0.125, 8.0)])
def test_an_adapters_requests_come_by_a_process_of_that_shape(shape: float, apart: float) -> None:
    warm, counted = Traffic(TENANTS, 20.0, 0.0, shape).arrivals(500, 3500, 0)
    assert (len(warm), len(counted), counted[0].at) == (500, 3500, 0.0)
    times: dict[str, list[float]] = {}
    for one in counted:
        times.setdefault(one.model, []).append(one.at)
    gaps = [np.diff(own) for own in times.values()]
    assert counted[-1].at == pytest.approx(3500 / 20, rel=0.25)
    spread = np.mean([gap.var() / gap.mean() ** 2 for gap in gaps])
    assert 0.6 * apart < spread < 1.4 * apart, "squared coefficient of variation: 1 / shape"


def test_routers_get_the_same_requests() -> None:
    assert Traffic(TENANTS, 20.0, 1.0, 0.5).arrivals(5, 20, 7) == Traffic(TENANTS, 20.0, 1.0, 0.5).arrivals(5, 20, 7)


def test_adapters_that_answer_like_an_earlier_one_are_left_out() -> None:
    answers = {"a": [("p", "x"), ("q", "y")], "b": [("p", "x"), ("q", "z")], "c": [("p", "y"), ("q", "x")]}
    assert list(telling(answers, 3)) == ["a", "c"]
    assert list(telling(answers, 1)) == ["a"]


def test_a_far_store_answers_late_and_any_number_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("weights")
    with FarStore(tmp_path, 0.2) as far, ThreadPoolExecutor(8) as pool:
        begun = time.monotonic()
        assert list(pool.map(lambda _: httpx.get(f"{far.url}/a").text, range(8))) == ["weights"] * 8
        assert time.monotonic() - begun > 0.2
        assert httpx.head(f"{far.url}/b").status_code == 404


def run(policy: Policy, repetition: int, ttfts: list[float], found: int, loads: int) -> Run:
    asked = len(ttfts)
    replicas = {
        "a": {"asked": asked, "found": found, "loads": loads, "fetched": loads},
        "b": {"asked": 0, "found": 0, "loads": 0, "fetched": 0},
    }
    return Run(policy, repetition, [outcome(ttft=ttft) for ttft in ttfts], replicas, {"hub": 1.0}, 4.0)


RUNS = [
    run(Policy.OURS, 1, [0.1, 0.2], 1, 1),
    run(Policy.OURS, 2, [0.3, 0.4], 2, 2),
    run(Policy.HASH, 1, [0.2, 0.2], 0, 4),
    run(Policy.HASH, 2, [0.2, 0.2], 1, 2),
]


def test_repetitions_together() -> None:
    ours, rival = together(RUNS)
    assert (ours["policy"], ours["requests"], ours["exact"], ours["errors"]) == ("ours", 4, 4, 0)
    assert (ours["hit_rate"], ours["loads"], ours["busiest"]) == (0.75, 1.5, 2.0)
    assert (ours["ttft_ms_p50"], ours["ttft_ms_p99"], ours["hub_cores"]) == (200.0, 400.0, 0.25)
    assert ours["ttft_ms_p99_median"] == pytest.approx(300.0)
    assert (rival["policy"], rival["hit_rate"], rival["loads"]) == ("hash", 0.25, 3.0)
    (line,) = verdict([ours, rival, *(each.row() for each in RUNS)])
    assert line.startswith("against hash: 3 to 6 loads, 50.0 % fewer, hit rate 0.750 to 0.250")


def test_the_picture_of_a_comparison() -> None:
    rows = [*together(RUNS), *(each.row() for each in RUNS)]
    content = {"benchmark": "routing", "device": "a CPU", "date": "2026-01-01", "rows": rows}
    figure = draw(content)
    assert [axes.get_title() for axes in figure.axes] == ["Found in a slot", "Loads", "Time to first token, p99"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.75, 0.25]
    with pytest.raises(ValueError, match="no rows of a comparison"):
        draw(content | {"rows": [account([outcome()])]})


def test_every_request_of_a_run_with_a_lost_node_is_accounted_for() -> None:
    row = account(
        [
            outcome(),
            outcome(moved=True),
            outcome("ab", Ending.TOLD),
            outcome("ab", Ending.CUT),
        ]
    )
    assert (row["whole"], row["moved"], row["told"], row["cut"]) == (2, 1, 1, 1)
    assert failures(row) == []


@pytest.mark.parametrize(
    ("answer", "lost"),
    [
        (Answer(0.0, 0.0, (), 1.0, 0, 0, "cannot connect", Ending.CUT), True),
        (Answer(0.0, 0.0, (), 1.0, 0, 0, "HTTP 500: Internal Server Error", Ending.REFUSED), True),
        (Answer(0.0, 0.0, (), 1.0, 0, 0, 'HTTP 503: {"error":{"message":"full"}}', Ending.REFUSED), False),
        (Answer(0.0, 0.0, (0.5,), 1.0, 0, 1, "cut short", Ending.CUT, "a"), False),
        (Answer(0.0, 0.0, (), 1.0, 0, 0, "no whole answer within 60 s", Ending.LATE), False),
    ],
)
def test_another_gateway_is_asked_only_when_the_first_one_is_gone(answer: Answer, lost: bool) -> None:
    assert gateway_lost(answer) is lost


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (outcome("", Ending.REFUSED), "lost"),
        (outcome("", Ending.CUT, moved=True), "lost"),
        (outcome("", Ending.LATE), "lost"),
        (outcome("", Ending.TOLD), "lost"),
        (outcome("abce"), "wrong"),
        (outcome("abx", Ending.TOLD), "wrong"),
        (outcome("ab", Ending.LATE), "untold"),
    ],
)
def test_what_must_not_be(bad: Outcome, kind: str) -> None:
    assert failures(account([outcome(), bad])) == [f"1 {kind}"]

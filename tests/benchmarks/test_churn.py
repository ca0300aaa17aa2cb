"""The churn benchmark as a user runs it, on the tiny shape: every part, and a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.churn import __main__ as churn
from benchmarks.churn.copies import ChurnCopies

SMALL = (
    "--slots", "5", "--prompt", "8", "--repeats", "2", "--rows", "2", "--arrivals", "4", "--batch", "3",
    "--windows", "2", "--window-s", "0.5", "--rate", "40", "--duration", "0.5", "--tokens", "4",
)  # fmt: skip


def run_churn(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["churn", "--shape", "tiny", *SMALL, *arguments])
    churn.main()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_every_part_moves_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "churn.json"
    run_churn(monkeypatch, "--json", str(file))
    rows = {(row["mode"], row["case"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {
        ("copy", "host to slot"), ("copy", "disk to host"),
        ("arrivals", "resident"), ("arrivals", "host"), ("arrivals", "disk"),
        ("loads", "from disk to slot"), ("loads", "cold arrivals"),
        ("poisson", "resident"), ("poisson", "churn"),
    }  # fmt: skip
    moved = {key: (row["reads"], row["copies"]) for key, row in rows.items() if key[0] != "copy"}
    assert moved.pop(("poisson", "churn"))[1] > 0
    assert moved == {
        ("arrivals", "resident"): (0, 0), ("arrivals", "host"): (0, 4), ("arrivals", "disk"): (4, 4),
        ("loads", "from disk to slot"): (2, 2), ("loads", "cold arrivals"): (2, 2),
        ("poisson", "resident"): (0, 0),
    }  # fmt: skip
    for (mode, case), row in rows.items():
        if mode == "copy":
            assert 0 < row["ms_p50"] <= row["ms_max"]
        else:
            assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"]
        if case in {"disk", "churn", "cold arrivals"}:
            assert row["ttft_ms_p50"] > 0
    for case in ("from disk to slot", "cold arrivals"):
        row = rows["loads", case]
        assert row["ratio"] == pytest.approx(row["itl_ms_p99"] / row["quiet_itl_ms_p99"])
    quiet, busy = rows["poisson", "resident"], rows["poisson", "churn"]
    assert busy["arrivals"] == quiet["arrivals"]
    assert busy["ratio"] == pytest.approx(busy["ttft_ms_p50"] / quiet["ttft_ms_p50"])


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "churn.json"

    async def fails(self: ChurnCopies, made: object) -> None:
        raise RuntimeError("no copies today")

    monkeypatch.setattr(ChurnCopies, "measure", fails)
    with pytest.raises(SystemExit) as exit_:
        run_churn(monkeypatch, "--json", str(file), "--parts", "poisson,copies")
    assert exit_.value.code == 1
    assert "no copies today" in capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    assert rows[0] == {"mode": "copies", "error": "RuntimeError: no copies today"}
    assert [(row["mode"], row["case"]) for row in rows[1:]] == [("poisson", "resident"), ("poisson", "churn")]


def test_rows_are_judged_by_what_is_asked() -> None:
    row = {"mode": "arrivals", "case": "host", "itl_ms_p99": 26.0, "ttft_ms_p50": 45.5}
    assert churn.judged(row) == row | {"limit": "itl_ms_p99 <= 27, ttft_ms_p50 <= 45", "met": False}
    assert churn.judged(row | {"ttft_ms_p50": 45.0})["met"]
    for unlimited in ({"mode": "poisson", "case": "resident"}, {"mode": "arrivals, host", "error": "x"}):
        assert churn.judged(unlimited) == unlimited


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--parts", "copies,some"], "some: choose from copies"), (["--batch", "5"], "more --slots")],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_churn(monkeypatch, *arguments)
    assert message in capsys.readouterr().err

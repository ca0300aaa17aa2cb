"""The decode benchmark as a user runs it, on the tiny shape: batches, arrivals, the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.percentile import percentile
from benchmarks.common.timeline import Timeline
from benchmarks.decode import __main__ as decode
from benchmarks.decode.batches import summarize, with_added_cost
from benchmarks.decode.gpu_trace import kernel_times
from benchmarks.plot import draw as plot
from benchmarks.plot.decode import DecodeResults


def run_decode(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["decode", "--shape", "tiny", *arguments])
    decode.main()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_batches_are_measured_and_drawn_beside_a_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = tmp_path / "other.json"
    rival.write_text(json.dumps({"name": "other engine", "rows": [{"mode": "base", "batch": 2, "tok_s": 900.0}]}))
    file, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    run_decode(
        monkeypatch, "--batch", "1,2", "--adapters", "2", "--tokens", "12", "--prompt", "8",
        "--json", str(file), f"--plot={picture}", "--rival", str(rival),
    )  # fmt: skip
    result = json.loads(file.read_text())
    assert "--json" not in result["command"]
    assert "--plot" not in result["command"]
    rows = {(row["mode"], row["batch"]): row for row in result["rows"]}
    assert rows.keys() == {(mode, batch) for mode in ("distinct", "base") for batch in (1, 2)}
    for (mode, batch), row in rows.items():
        assert 0 < row["step_ms_p50"] <= row["step_ms_p99"]
        assert row["tok_s"] > 0
        assert row["adapters"] == (batch if mode == "distinct" else 0)
        if mode == "distinct":
            assert row["lora_ms"] == pytest.approx(row["step_ms_p50"] - rows["base", batch]["step_ms_p50"])
            assert row["floor_ms"] > rows["base", batch]["floor_ms"]
        else:
            assert "lora_ms" not in row
    assert picture.read_bytes().startswith(b"\x89PNG")
    labels = {line.get_label() for line in plot.draw(result, [rival]).axes[0].lines}
    assert labels == {
        "byte floor, base", "byte floor, distinct", "LoRAFleet, distinct", "LoRAFleet, base", "other engine, base",
    }  # fmt: skip


def test_arrivals_beside_running_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "arrivals.json"
    run_decode(
        monkeypatch, "--adapters", "3", "--rows", "2", "--arrivals", "3", "--prompt", "8", "--long-prompt", "1100",
        "--json", str(file),
    )  # fmt: skip
    content = json.loads(file.read_text())
    short, long = content["rows"]
    assert (short["mode"], short["prompt"], short["arrivals"]) == ("arrivals", 8, 3)
    assert (long["mode"], long["prompt"], long["arrivals"]) == ("long_prompt", 1100, 3)
    for row in (short, long):
        assert row["running"] == 2
        assert 0 < row["itl_ms_p50"] <= row["itl_ms_p99"]
        assert 0 < row["quiet_itl_ms_p50"] <= row["quiet_itl_ms_p99"]
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"]
    with pytest.raises(ValueError, match="rows of whole batches"):
        DecodeResults(content)


def test_a_running_row_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.decode.arrivals.RUNNING_TOKENS", 20)
    with pytest.raises(RuntimeError, match="ended before the measurement"):
        run_decode(monkeypatch, "--adapters", "1", "--rows", "1", "--arrivals", "--prompt", "8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dist", "base,some"], "some: choose from distinct"),
        (["--rival", "x.json"], "--plot FILE.png"),
        (["--arrivals", "--plot", "x.png"], "none are measured"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_decode(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_steps_count_only_while_all_rows_decode() -> None:
    early = Timeline(0.0, [1.0, 2.0, 3.0, 4.0, 5.0])
    late = Timeline(0.5, [2.5, 3.0, 4.5, 5.5])
    row = summarize([early, late])
    assert row["step_ms_p50"] == pytest.approx(1000.0)  # early 3-4 and 4-5, late 2.5-3 and 3-4.5
    assert row["step_ms_p99"] == pytest.approx(1500.0)
    assert row["tok_s"] == pytest.approx((3 + 2) / 2.5)
    assert row["ttft_ms_p50"] == pytest.approx(1500.0)
    with pytest.raises(ValueError, match="raise --tokens"):
        summarize([Timeline(0.0, [1.0, 2.0]), Timeline(0.0, [3.0, 4.0])])


def test_added_cost_needs_a_base_row_of_the_batch() -> None:
    rows: list[dict[str, Any]] = [
        {"mode": "zipf", "batch": 1, "step_ms_p50": 5.0},
        {"mode": "zipf", "batch": 2, "step_ms_p50": 6.0},
        {"mode": "base", "batch": 2, "step_ms_p50": 4.0},
    ]
    assert [row.get("lora_ms") for row in with_added_cost(rows)] == [None, 2.0, None]


def test_waits_count_where_they_touch_the_window() -> None:
    line = Timeline(0.0, [1.0, 2.0, 4.0, 5.0, 7.0])
    assert line.gaps_ms(1.5, 4.5) == [1000.0, 2000.0, 1000.0]
    assert line.gaps_ms(2.0, 4.0) == [2000.0]


def test_percentiles_are_measured_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) is None


def test_a_rival_in_another_form_is_refused(tmp_path: Path) -> None:
    result = {
        "benchmark": "decode", "device": "some", "date": "today", "rows": [{"mode": "base", "batch": 1, "tok_s": 1.0}],
    }  # fmt: skip
    file = tmp_path / "rival.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match='no list of "rows"'):
        plot.draw(result, [file])
    file.write_text(json.dumps({"rows": [{"batch": 1}]}))
    with pytest.raises(ValueError, match=r"rival rival: no row has mode .*batch and tok_s"):
        plot.draw(result, [file])
    with pytest.raises(ValueError, match="beside a result of benchmarks"):
        plot.draw(result | {"benchmark": "kernels"}, [file])


def test_kernel_times_are_those_of_whole_steps() -> None:
    def launch(correlation: int, kernels: int, us: float) -> list[dict[str, object]]:
        names = ("a", *["b"] * (kernels - 1))
        return [{"cat": "kernel", "name": name, "dur": us, "args": {"correlation": correlation}} for name in names]

    small = launch(9, 3, 1000.0)
    events = [*launch(4, 40, 2.0), *launch(1, 40, 99.0), *small, *launch(3, 40, 1.0), *launch(12, 40, 99.0)]
    assert kernel_times([{"cat": "cpu_op"}, *events]) == {"b": 39 * 1.5, "a": 1.5}
    with pytest.raises(ValueError, match="trace for longer"):
        kernel_times(launch(1, 40, 1.0) + launch(2, 40, 1.0))

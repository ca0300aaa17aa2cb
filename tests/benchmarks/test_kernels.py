"""The kernel benchmark as a user runs it, on the tiny shape: its rows, its rivals, its picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels.lora_work import AdapterRows, group_work, segment_work, stacked_work
from benchmarks.kernels.rivals import Rival
from benchmarks.kernels.setting import KernelSetting
from benchmarks.plot import __main__ as plot
from benchmarks.plot.kernels import FAMILIES, KernelResults
from kernels.lora_group import LoraGroup

GOOD_RIVAL = """
from kernels import reference
def expand(inputs, weights, output, indices, add_inputs=True):
    reference.bgmv_expand(inputs, weights, output, indices, add_inputs)
"""
WRONG_RIVAL = """
def expand(inputs, weights, output, indices, add_inputs=True):
    output += 1
def shrink(inputs, weights, output, indices, scaling=1.0):
    raise RuntimeError("not on this device")
"""


def run_command(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def setting() -> KernelSetting:
    return KernelSetting(measured=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over all operations."""
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        run_command(patch, kernels, "--shape", "tiny", "--workers", "0", "--json", str(file))
    return json.loads(file.read_text())


def test_every_kernel_has_rows_in_the_form_of_all_results(result: dict[str, Any]) -> None:
    assert result.keys() == {"benchmark", "device", "versions", "command", "date", "rows"}
    ceilings = {row["kernel"]: row for row in result["rows"] if "of_copy" not in row}
    assert {"copy", "matmul"} <= ceilings.keys()
    bandwidth = ceilings["copy"]["bytes"] / ceilings["copy"]["us"]
    rows = [row for row in result["rows"] if "of_copy" in row]
    names = {row["kernel"].split()[0] for row in rows}
    assert names == {
        "bgmv_expand", "bgmv_shrink", "bgmv_expand_slices", "bgmv_shrink_slices", "sgmv_expand", "sgmv_shrink",
        "paged_decode", "paged_prefill", "residual_rms_norm", "rope_write_kv", "rope_write_kv+norm", "silu_mul",
        "lora_step", "sample",
    }  # fmt: skip
    for row in rows:
        assert row.keys() >= {"kernel", "hidden", "rank", "batch", "dist", "us", "bytes", "floor_us", "limit_us", "ok"}
        assert row["floor_us"] == pytest.approx(row["bytes"] / bandwidth)
        assert row["of_copy"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["us"] > 0 or row["kernel"].startswith("lora_step")
        assert row["kernel"] not in {"bgmv_expand", "bgmv_shrink"} or min(row["x_gather"], row["x_loop"]) > 0


def test_a_step_is_measured_with_and_without_lora(result: dict[str, Any]) -> None:
    steps = [row for row in result["rows"] if row["kernel"] == "lora_step"]
    assert {(row["dist"], row["batch"]) for row in steps} == {
        (dist, batch) for dist in ("distinct", "zipf", "identical", "base") for batch in (1, 4)
    }
    for row in steps:
        assert row["added_ms"] == pytest.approx(row["lora_ms"] - row["base_ms"])
        assert row["us"] == pytest.approx(row["added_ms"] * 1e3)
    adapter = {row["batch"]: row["bytes"] for row in steps if row["dist"] == "distinct"}
    assert adapter[4] == 4 * adapter[1] > 0
    assert all(row["bytes"] == 0 for row in steps if row["dist"] == "base")


def test_the_plot_is_drawn_from_the_file(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(result))
    run_command(monkeypatch, plot, str(file))
    picture = (tmp_path / "kernels.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    times, roofline, steps = KernelResults(result).draw().axes
    labels = {text.get_text() for text in times.get_legend().get_texts()}  # pyright: ignore[reportOptionalMemberAccess]
    assert {family.label for family in FAMILIES} < labels
    assert roofline.get_title() == "Roofline"
    assert len(steps.patches) == 8, "a bar for each distribution and batch"
    with pytest.raises(ValueError, match=r"not a result of benchmarks\.kernels"):
        KernelResults(result | {"benchmark": "decode"})


def test_rivals_are_timed_where_they_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(GOOD_RIVAL)
    (tmp_path / "wrong.py").write_text(WRONG_RIVAL)
    file = tmp_path / "rivals.json"
    rivals = [f"{tmp_path}/good.py:expand", f"{tmp_path}/wrong.py:expand", f"shrink={tmp_path}/wrong.py:shrink"]
    arguments = [f"--rival={rival}" for rival in [*rivals, "expand=kernels.reference:bgmv_expand"]]
    run_command(
        monkeypatch, kernels, "--shape", "tiny", "--ops", "expand,shrink", "--hidden", "256", "--rank", "8",
        "--batch", "4", "--workers", "0", "--json", str(file), *arguments,
    )  # fmt: skip
    out, err = capsys.readouterr()
    rows = json.loads(file.read_text())["rows"]
    expand = [row for row in rows if row["kernel"] == "bgmv_expand"]
    assert all(row["x_good"] > 0 and row["x_reference"] > 0 and "x_wrong" not in row for row in expand)
    assert not any("x_wrong" in row for row in rows if row["kernel"] == "bgmv_shrink")
    assert "wrong left out: ValueError: wrong by" in err
    assert "wrong left out: RuntimeError: not on this device" in err
    assert "good" in next(line for line in out.splitlines() if line.startswith("bgmv_expand: "))


@pytest.mark.parametrize("text", ["expand", "module:", ":function", "fold=module:function", "module:a-b"])
def test_a_rival_must_be_named_in_full(text: str) -> None:
    with pytest.raises(ValueError, match=r"give .*module:function"):
        Rival.parse(text)


def test_a_rival_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="is no Python file"):
        Rival.parse("no/such/file.py:function").load()


@pytest.mark.parametrize(("dist", "distinct"), [("distinct", 6), ("identical", 1), ("base", 0)])
def test_steps_read_adapters_of_their_own(setting: KernelSetting, dist: str, distinct: int) -> None:
    rows = AdapterRows.make(setting, dist, 6, 20, 5)
    assert rows.distinct == distinct
    used = [index.tolist() for index in rows.indices]
    assert all(len(set(step)) == max(distinct, 1) for step in used)
    if distinct:
        assert not set(used[0]) & set(used[1])
    assert all(index.data_ptr() % 64 == rows.storage.data_ptr() % 64 for index in rows.indices)


def test_more_rows_than_adapters_share_them(setting: KernelSetting) -> None:
    rows = AdapterRows.make(setting, "distinct", 128, 1000, 2)
    assert rows.distinct == 64
    assert sorted(rows.indices[1].tolist()) == sorted([64 + number for number in range(64)] * 2)


def test_moved_bytes_count_each_adapter_once(setting: KernelSetting) -> None:
    expand = stacked_work(setting, "expand", 256, 8, 4, "distinct")
    assert expand.moved == 4 * 256 * 8 * 2 + 2 * 4 * 256 * 2 + 4 * 8 * 4
    same = stacked_work(setting, "shrink", 256, 8, 4, "identical")
    assert same.moved == 256 * 8 * 2 + 4 * 256 * 2 + 4 * 8 * 4
    group = LoraGroup(0, 64, (64, 32))
    assert group_work(setting, "shrink_slices", group, 8, 16, 3, "distinct").moved == (
        3 * 8 * 128 * 2 + 3 * 64 * 2 + group.splits * 2 * 3 * 8 * 4
    )
    assert group_work(setting, "expand_slices", group, 8, 8, 3, "base").moved == 0
    assert segment_work(setting, "sgmv_expand", group, 8, 2, 5).moved == (
        2 * 8 * 96 * 2 + 2 * 10 * 8 * 4 + 2 * 10 * 96 * 2
    )


def test_a_wrong_result_is_told(setting: KernelSetting) -> None:
    for work in (
        stacked_work(setting, "expand", 64, 8, 3, "distinct"),
        group_work(setting, "shrink_slices", LoraGroup(0, 64, (32,)), 8, 8, 3, "zipf"),
    ):
        work.check(lambda work=work: work.step(0))
        with pytest.raises(ValueError, match="wrong by"):
            work.check(lambda work=work: work.step(1))

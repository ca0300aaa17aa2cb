"""The tuner: what it tries, what it chooses, and the table it leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.tune import __main__ as tune
from benchmarks.tune.choice import Trial, choose
from benchmarks.tune.problem import OPS, problems
from benchmarks.tune.space import SPACES, candidates
from benchmarks.tune.table import merged, table_path, update_table
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from kernels import op_configs
from kernels.op_configs import default_config, get_lora_op_configs


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("hidden", "rank"), [(1024, 8), (4096, 16), (14336, 64), (300, 5)])
def test_candidates_are_launchable_and_start_with_the_default(op: str, hidden: int, rank: int) -> None:
    found = candidates(op, hidden, rank)
    assert found[0] == default_config(op, hidden, rank)
    assert len(found) == len({tuple(sorted(config.items())) for config in found})
    assert len(found) >= 3
    for config in found:
        assert config.keys() <= set(op_configs._OP_KEYS[op])
        assert all(config[key] & (config[key] - 1) == 0 for key in op_configs.POWERS if key in config)
        if "SPLIT_N" in config:
            assert 1 <= config["SPLIT_N"] <= -(-hidden // config["BLOCK_N"])
    assert SPACES[op].choices.keys() <= set(op_configs._OP_KEYS[op])


def trial(us: tuple[float, ...], bits: str = "same", **config: int) -> Trial:
    return Trial("expand", config, bits, us)


def test_small_gains_are_no_reason_for_rows() -> None:
    default = trial((10.0, 10.0), BLOCK_N=64, num_warps=4)
    assert choose([trial((9.8, 9.75), BLOCK_N=32, num_warps=4)], default) is None
    assert choose([], default) is None


def test_batches_of_a_key_mix_only_what_leaves_the_sums_order() -> None:
    default = trial((10.0, 10.0), BLOCK_N=64, num_warps=4)
    small, large = trial((8.0, 12.0), BLOCK_N=32, num_warps=4), trial((12.0, 8.0), BLOCK_N=128, num_warps=4)
    assert choose([small, large], default) == [small, large]
    assert choose([small, large], default, mixed=False) is None, "each alone loses somewhere"
    warps = trial((12.0, 8.0), BLOCK_N=128, num_warps=8)
    assert choose([small, warps], default) == [small, default], "another number of warps may sum in another order"
    other_bits = trial((12.0, 8.0), "other", BLOCK_N=128, num_warps=4)
    assert choose([small, other_bits], default) == [small, default], "and so does what its results show"


def test_the_order_with_the_greatest_gain_wins() -> None:
    default = trial((10.0, 10.0), num_warps=4)
    good, better = trial((9.0, 9.0), num_warps=8), trial((9.9, 7.0), num_warps=2)
    assert choose([good, better], default) == [better, better]
    losing = trial((10.5, 5.0), num_warps=1)
    assert choose([good, better, losing], default) == [better, better]


def test_new_rows_replace_their_keys_alone(tmp_path: Path) -> None:
    def row(op: str, hidden: int, batch: int, us: float) -> dict[str, object]:
        return {"op": op, "hidden": hidden, "rank": 16, "batch": batch, "config": {"BLOCK_N": 16}, "us": us}

    path = table_path(tmp_path, "Some GPU")
    update_table(
        path, "Some GPU", [row("shrink", 64, 1, 1.0), row("expand", 64, 8, 2.0), row("expand", 64, 1, 3.0)], []
    )
    rows = update_table(path, "Some GPU", [row("expand", 64, 32, 4.0)], {("expand", 64, 16), ("expand", 128, 16)})
    assert [(each["op"], each["batch"]) for each in rows] == [("expand", 32), ("shrink", 1)]
    content = json.loads(path.read_text())
    assert content["device"] == "Some GPU"
    assert content["rows"] == rows == list(op_configs.read_table(path))
    assert path.read_text().count("\n") == 8, "one row a line"
    assert merged(rows, [], {("shrink", 64, 16)}) == rows[:1]
    assert update_table(path, "Some GPU", [], {("expand", 64, 16), ("shrink", 64, 16)}) == []
    assert not path.exists()


def test_keys_of_a_model_are_searched_once() -> None:
    spec = ModelSpec.from_config(tune.SHAPES["llama-3-8b"], "llama-3-8b")
    for op in OPS:
        found = list(problems(op, adapter_layout(spec), (1024, 4096), (8, 16), (1, 64), ((64, 128),)))
        keys = [(problem.hidden, problem.rank) for problem in found]
        assert len(keys) == len(set(keys))
    slices = list(problems("shrink_slices", adapter_layout(spec), (), (16,), (1, 64), ()))
    assert [(problem.hidden, len(problem.users)) for problem in slices] == [(4096, 3), (14336, 1)]


def test_the_command_writes_a_table_that_lookups_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a CPU all candidates run the same twin; let any difference count, so that rows come of it.
    monkeypatch.setattr("benchmarks.tune.choice.GAIN", -10.0)
    monkeypatch.setattr("benchmarks.tune.choice.LOSS", 0.99)
    arguments = ["--shape", "tiny", "--ops", "expand,sgmv_expand", "--rank", "8", "--batch", "1,4", "--hidden", "256"]
    monkeypatch.setattr(sys, "argv", ["tune", *arguments, "--workers", "0", "--out", str(tmp_path)])
    tune.main()
    assert "4 of 4 keys beat their defaults" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    rows = op_configs.read_table(path)
    assert {(row["op"], row["batch"]) for row in rows} == {("expand", 1), ("expand", 4), ("sgmv_expand", 1)}
    assert all(row["us"] > 0 and row["default_us"] > 0 for row in rows)
    monkeypatch.setattr(op_configs, "CONFIGS_DIR", tmp_path)
    op_configs._config.cache_clear()
    device = json.loads(path.read_text())["device"]
    for row in rows:
        looked_up = get_lora_op_configs(row["op"], row["batch"], row["hidden"], rank=row["rank"], device=device)
        assert looked_up == row["config"]
    op_configs._config.cache_clear()


def test_no_time_means_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "--shape", "tiny", "--seconds", "-1", "--out", str(tmp_path)])
    tune.main()
    assert "not reached" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

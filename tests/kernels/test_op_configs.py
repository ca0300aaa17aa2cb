"""Launch configurations: the tuned table's nearest row, and defaults that any kernel can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels import op_configs
from kernels.bgmv_expand import get_lora_op_configs

OPS = (
    "expand",
    "shrink",
    "expand_shared",
    "shrink_shared",
    "expand_slices",
    "shrink_slices",
    "sgmv_expand",
    "sgmv_shrink",
)


def test_defaults_cover_the_output_and_waste_no_program() -> None:
    for hidden in (1, 7, 33, 1000, 1024, 4096, 14336, 128256):
        for rank in (1, 5, 16, 64, 128, 1024):
            config = get_lora_op_configs("expand", 8, hidden, rank=rank, device="cpu")
            tiles = -(-hidden // config["BLOCK_N"])
            assert config["SPLIT_N"] == tiles
            for op in OPS:
                config = get_lora_op_configs(op, 8, hidden, rank=rank, device="cpu")
                assert all(config[key] & (config[key] - 1) == 0 for key in op_configs.POWERS if key in config)
                assert "BLOCK_N" in config


def test_defaults_do_not_depend_on_the_batch() -> None:
    for op in OPS:
        configs = [get_lora_op_configs(op, batch, 4096, rank=16, device="cpu") for batch in (1, 7, 64, 1000)]
        assert all(config == configs[0] for config in configs)


def test_lorax_call_and_names() -> None:
    assert get_lora_op_configs("expand", 4, 1024) == get_lora_op_configs("bgmv_expand", 4, 1024, rank=16)
    config = get_lora_op_configs("bgmv_shrink", 4, 1024)
    config["BLOCK_N"] = 999  # a caller's copy
    assert get_lora_op_configs("shrink", 4, 1024)["BLOCK_N"] != 999
    with pytest.raises(ValueError, match="op_type 'fold' is unknown; use one of expand, "):
        get_lora_op_configs("fold", 1, 1)


def test_tuned_table_gives_the_nearest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [(1024, 16, 1), (1024, 16, 32), (4096, 16, 8), (4096, 64, 8)]
    rows = [
        {"op": "expand", "hidden": h, "rank": r, "batch": b, "config": {"BLOCK_N": 16 << i, "SPLIT_N": 4}}
        for i, (h, r, b) in enumerate(keys)
    ]
    (tmp_path / "Some_GPU_80GB.json").write_text(json.dumps({"device": "Some GPU 80GB", "rows": rows}))
    monkeypatch.setattr(op_configs, "CONFIGS_DIR", tmp_path)

    def block(batch: int, hidden: int, rank: int) -> int:
        return get_lora_op_configs("expand", batch, hidden, rank=rank, device="Some GPU 80GB")["BLOCK_N"]

    assert block(1, 1024, 16) == 16
    assert block(24, 1000, 12) == 32
    assert block(1, 14336, 8) == 64
    assert block(1, 1024, 128) == 128, "rank counts before hidden"
    other = get_lora_op_configs("shrink", 1, 1024, rank=16, device="Some GPU 80GB")
    assert other == op_configs.default_config("shrink", 1024, 16)
    for hidden, rank in ((4096 * 5, 16), (200, 16), (1024, 4), (1024, 160)):
        far = get_lora_op_configs("expand", 8, hidden, rank=rank, device="Some GPU 80GB")
        assert far == op_configs.default_config("expand", hidden, rank), "no row is for anything like it"
    wider = get_lora_op_configs("expand", 8, 3 * 4096, rank=16, device="Some GPU 80GB")
    assert wider["SPLIT_N"] == 3 * 4, "a program's share of hidden stays as it was tuned"


def test_a_trial_replaces_lookups_of_its_operation_while_it_lasts() -> None:
    before = get_lora_op_configs("expand", 1, 1024)
    with op_configs.trial_config("expand", {"BLOCK_N": 4}), op_configs.trial_config("shrink", {"BLOCK_N": 8}):
        assert get_lora_op_configs("bgmv_expand", 1, 1024) == {"BLOCK_N": 4}
        assert get_lora_op_configs("shrink", 1, 1024) == {"BLOCK_N": 8}
        assert get_lora_op_configs("expand_slices", 1, 1024)["BLOCK_N"] != 4
    assert get_lora_op_configs("expand", 1, 1024) == before


def test_shipped_tables_hold_known_keys() -> None:
    for path in op_configs.CONFIGS_DIR.glob("*.json"):
        for row in op_configs.read_table(path):
            assert row["config"].keys() <= set(op_configs._OP_KEYS[row["op"]]), (path, row)
            assert min(row["hidden"], row["rank"], row["batch"]) >= 1


def test_batches_of_a_shipped_key_share_what_orders_their_sums() -> None:
    """A row's bits must not depend on its batch, so the table may not let them."""
    for path in op_configs.CONFIGS_DIR.glob("*.json"):
        orders: dict[tuple[object, ...], dict[str, int]] = {}
        for row in op_configs.read_table(path):
            free = op_configs.BATCH_KEYS.get(row["op"], ())
            order = {key: value for key, value in row["config"].items() if key not in free}
            assert orders.setdefault((row["op"], row["hidden"], row["rank"]), order) == order, (path, row)

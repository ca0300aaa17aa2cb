"""The benchmark of structured and penalised rows as a user runs it, on the tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import structured


def test_every_mode_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    file = tmp_path / "structured.json"
    arguments = ["--batch", "4", "--structured", "1", "--tokens", "16", "--prompt", "8", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["structured", "--shape", "tiny", *arguments, "--json", str(file)])
    structured.main()
    rows = {row["mode"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"free", "structured", "fewer", "penalised", "biased"}
    assert rows["free"]["ratio"] == 1.0
    assert rows["fewer"]["batch"] == 3
    for row in rows.values():
        assert 0 < row["step_ms_p50"] <= row["step_ms_p99"]
    assert rows["structured"]["mask_us"] > 0

"""``python -m deployments.sizing``: figures that a server's settings lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.sizing import main, zipf_share

ROOT = Path(__file__).parents[2]
SHIPPED = ["--config", str(ROOT / "serve_config.yaml"), "--gpu-gib", "1", "--reserve-gib", "0.25"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main([*SHIPPED, *arguments])
    return capsys.readouterr().out


def test_memory_of_the_shipped_settings(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys).splitlines()
    assert any("3 slots of rank 16" in line for line in lines)
    assert any(line.startswith("KV cache: ") and "for each of 16 rows" in line for line in lines)


def test_other_slots_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--slots", "8:20,32:2", "--rows", "4")
    assert "20 slots of rank 8" in text
    assert "2 slots of rank 32" in text
    assert "for each of 4 rows" in text


def test_replicas_follow_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    # 100 requests a second, each 129 steps of 10 ms: 129 rows, on replicas of 16 that are to be busy for four fifths.
    text = said(capsys, "--rate", "100", "--output", "128", "--prompt", "100", "--step-ms", "10")
    assert "keep 129 rows busy: 11 replicas of 16 rows (bounded by rows)" in text


def test_slots_for_a_hit_rate(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--adapters", "10", "--zipf", "0", "--slots", "4:5")
    assert "at best 50.0 % of requests find theirs in a slot" in text
    assert "90 % need 9 slots in all" in text


def test_too_little_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is left" in said(capsys, "--gpu-gib", "0.25")


def test_what_cannot_be_calculated_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in ((["--rate", "1"], "needs --step-ms"), (["--slots", "0:1"], "slots is {0: 1}")):
        with pytest.raises(SystemExit) as ended:
            main([*SHIPPED, *arguments])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_shares_by_zipf() -> None:
    assert zipf_share(2, 2, 1.3) == 1
    assert zipf_share(1, 3, 1.0) == pytest.approx(6 / 11)

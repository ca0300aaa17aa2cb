"""Running cases in fresh processes, which is how kernels are compiled beforehand."""

from __future__ import annotations

import pytest

from benchmarks.kernels.lora_cases import StackedCase
from benchmarks.kernels.precompile import precompile
from benchmarks.kernels.rivals import Rival


def test_jobs_run_elsewhere_and_say_what_fails(capfd: pytest.CaptureFixture[str]) -> None:
    good = StackedCase("expand", 64, 8, 2, "distinct", (Rival.parse("no_such_module:function"),))
    bad = StackedCase("expand", 64, 0, 2, "distinct")
    assert precompile([good, bad], workers=1) > 0
    err = capfd.readouterr().err
    assert err.count("not compiled: ") == 1
    assert "rank=0" in err
    assert "no_such_module left out: ModuleNotFoundError" in err

"""What the tuner files a configuration under is what the kernels look up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels.bgmv_expand
import kernels.bgmv_shrink
import kernels.sgmv
from benchmarks.kernels.setting import KernelSetting
from benchmarks.tune.problem import OPS, SHARED, STACKED, Problem, table_key
from kernels.dispatch import use_triton
from kernels.lora_group import LoraGroup
from kernels.op_configs import get_lora_op_configs

GROUP = LoraGroup(0, 48, (32, 16, 16))


@pytest.mark.parametrize("op", OPS)
def test_lookups_use_the_tuners_keys(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not use_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")):
        pytest.skip("the torch twins look nothing up")
    asked: list[tuple[str, int, int, int]] = []

    def recording(name: str, batch: int, hidden: int, *, rank: int, **options: Any) -> dict[str, int]:
        asked.append((name, batch, hidden, rank))
        return get_lora_op_configs(name, batch, hidden, rank=rank, **options)

    for module in (kernels.bgmv_expand, kernels.bgmv_shrink, kernels.sgmv):
        monkeypatch.setattr(module, "get_lora_op_configs", recording)
    stacked = op in (*STACKED, *SHARED)
    hidden, rank = (40, 8) if stacked else table_key(op, GROUP, 8)
    point = (2, 3) if op.startswith("sgmv") else 3
    problem = Problem(op, hidden, rank, (point,), () if stacked else ((GROUP, 8),))
    for work in problem.works(KernelSetting(measured=False), point):
        work.check(lambda work=work: work.step(0))
    assert set(asked) == {(op, problem.batch(point), hidden, rank)}

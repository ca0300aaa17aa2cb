"""What the torch twins owe beyond the kernels' own tests: they serve machines without Triton, and keep rows apart."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch

from kernels import bgmv_expand, bgmv_shrink, reference, sgmv
from kernels.lora_group import LoraGroup

CPU_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as on a machine without a Triton wheel
import torch
from kernels import reference
from kernels.bgmv_expand import bgmv_expand, bgmv_expand_slices, get_lora_op_configs
from kernels.bgmv_shrink import bgmv_shrink
from kernels.sgmv import sgmv_expand, sgmv_shrink
from kernels.dispatch import HAS_TRITON, use_triton
assert not HAS_TRITON and not use_triton(torch.zeros(1))
x, a, b = torch.randn(3, 12), torch.randn(2, 4, 12), torch.randn(2, 9, 4).bfloat16()
index = torch.tensor([1, -1, 0])
hidden, out = torch.zeros(3, 4), torch.zeros(3, 9)
bgmv_shrink(x, a, hidden, index)
bgmv_expand(hidden, b, out, index)
expected = torch.stack([b[1].float() @ (a[1] @ x[0]), torch.zeros(9), b[0].float() @ (a[0] @ x[2])])
torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
"""

INTERPRETER_ASKED_FOR_TOO_LATE = """
import os, torch
from kernels.bgmv_expand import bgmv_expand
from kernels.dispatch import HAS_TRITON
if not HAS_TRITON:
    raise SystemExit(0)  # nothing to launch
arguments = (torch.ones(1, 1), torch.ones(1, 1, 1).half(), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
bgmv_expand(*arguments)
assert arguments[2].item() == 2
os.environ["TRITON_INTERPRET"] = "1"
try:
    bgmv_expand(*arguments)
except RuntimeError as error:
    assert "set TRITON_INTERPRET=1 before the kernels are imported" in str(error), error
else:
    raise SystemExit("launched a compiled kernel on a CPU tensor")
"""


@pytest.mark.parametrize(
    "program", [CPU_WITHOUT_TRITON, INTERPRETER_ASKED_FOR_TOO_LATE], ids=["no_triton", "late_interpreter"]
)
def test_in_a_process_of_its_own(program: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-c", program], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [bgmv_expand, bgmv_shrink, sgmv])
def test_twins_have_the_kernels_signatures(module: object) -> None:
    for name in module.__all__:
        if name != "get_lora_op_configs":
            assert inspect.signature(getattr(module, name)) == inspect.signature(getattr(reference, name)), name


@pytest.mark.parametrize("rank", [1, 5, 8, 16])
@pytest.mark.parametrize("width", [7, 100, 128, 1000])
def test_bits_do_not_depend_on_the_address(rank: int, width: int) -> None:
    """CPU BLAS rounds by its operands' alignment: every offset of an fp32 arena within a cache line agrees."""
    group = LoraGroup(0, width, (width, 5))
    weights = torch.randn(rank * group.size)
    x = torch.randn(3, width)
    index, starts = torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3])
    results = []
    for offset in range(16):
        arena = torch.full((offset + weights.numel(),), torch.nan)
        arena[offset:] = weights
        table = torch.tensor([[offset, rank]])
        shifted = torch.zeros(offset + x.numel())[offset:].view_as(x).copy_(x)
        hidden = torch.zeros(2, 3, rank + offset)
        decode, prefill = torch.zeros(3, group.out_total), torch.zeros(3, group.out_total)
        reference.bgmv_shrink_slices(shifted, arena, table, hidden[None], index, group)
        reference.bgmv_expand_slices(hidden[None], arena, table, decode, index, group)
        reference.sgmv_shrink(shifted, arena, table, hidden, starts, index[:1], group, 3)
        reference.sgmv_expand(hidden, arena, table, prefill, starts, index[:1], group, 3)
        results.append((decode, prefill))
    for decode, prefill in results[1:]:
        assert torch.equal(decode, results[0][0])
        assert torch.equal(prefill, results[0][1])


def test_decode_bits_do_not_depend_on_how_many_rows_share_an_adapter() -> None:
    """A matrix product would round a row by the number of rows beside it."""
    group = LoraGroup(0, 128, (33,))
    arena, table = torch.randn(16 * group.size), torch.tensor([[0, 16]])
    x = torch.randn(9, 128)
    whole = torch.zeros(group.splits, 1, 9, 16)
    reference.bgmv_shrink_slices(x, arena, table, whole, torch.zeros(9, dtype=torch.int64), group)
    for rows in range(1, 9):
        part = torch.zeros(group.splits, 1, rows, 16)
        reference.bgmv_shrink_slices(x[:rows], arena, table, part, torch.zeros(rows, dtype=torch.int64), group)
        assert torch.equal(part, whole[:, :, :rows])

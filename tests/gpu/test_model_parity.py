"""The model on CUDA against transformers + peft on the CPU: the same mixed batches as tests/engine runs.

Tolerances: fp32 (no TF32) as on the CPU, ``TOLERANCE``; bf16: ``served.check_bf16``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.step import StepInputs
from tests.engine.oracle import TinyAdapter, TinyModel, build_tiny_model
from tests.engine.paged import PagedRunner, Row
from tests.engine.served import CASES, Served, prompt, rows_of, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MakeModel = Callable[..., TinyModel]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    def make(model_type: str, **config: Any) -> TinyModel:
        return build_tiny_model(tmp_path_factory.mktemp("tiny") / model_type, model_type, **config)

    return make


@pytest.mark.parametrize("case", CASES)
def test_fp32_mixed_batches_equal_each_adapter_alone(tiny_model: MakeModel, case: str) -> None:
    served = serve(tiny_model(**CASES[case]), device="cuda")
    rows = rows_of(served, [5, 23, 9, 17, 12, 30, 3, 14, 21, 7])
    served.runner().mixed_run([row for row, _ in rows], new_tokens=6, max_chunk=9)
    for row, adapter in rows:
        served.check(row, adapter)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_close_as_transformers_own_bf16(tiny_model: MakeModel, case: str) -> None:
    served = serve(tiny_model(**CASES[case]), torch.bfloat16, device="cuda")
    rows = rows_of(served, [9, 23, 14, 17, 12, 30, 3, 14, 21, 7])
    served.runner().mixed_run([row for row, _ in rows], new_tokens=6, max_chunk=9)
    served.check_bf16(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_pages_and_neighbours_change_no_bit(tiny_model: MakeModel, dtype: torch.dtype) -> None:
    served = serve(tiny_model(**CASES["llama"]), dtype, device="cuda")
    qv, everything, o_down, mlp = served.adapters

    def logits(neighbours: tuple[TinyAdapter | None, ...], seed: int) -> torch.Tensor:
        return torch.stack(served.among(neighbours, seed).logits)

    expected = logits((None, None, None), seed=1)
    assert torch.equal(logits((qv, everything, o_down), seed=2), expected)
    before = served.slot(everything)
    served.flood()
    assert served.slot(everything) != before
    assert torch.equal(logits((mlp, None, qv), seed=3), expected)


def decode_step(served: Served) -> tuple[PagedRunner, StepInputs]:
    rows = [row for row, _ in rows_of(served, [6, 11, 8, 13, 5])]
    runner = served.runner()
    runner.step([], [(row, len(row.tokens)) for row in rows])
    for row in rows:
        row.append_greedy()
    return runner, runner.plan(rows, [])


def test_forward_never_waits_for_the_device(tiny_model: MakeModel) -> None:
    served = serve(tiny_model(**CASES["qwen3"]), torch.bfloat16, device="cuda")
    runner, decode = decode_step(served)
    adapted, base = Row(prompt(9, seed=1), served.slot(served.adapters[1])), Row(prompt(4, seed=2), served.slot(None))
    steps = (decode, runner.plan([], [(adapted, 9), (base, 4)]))
    for step in steps:
        served.model.forward(step, runner.kv, served.lora)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            served.model.forward(step, runner.kv, served.lora)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_decode_step_replays_with_other_rows(tiny_model: MakeModel) -> None:
    """A graph captured on one step's tensors gives the eager bits for the tensors of another."""
    served = serve(tiny_model(**CASES["llama"]), torch.bfloat16, device="cuda")
    runner, inputs = decode_step(served)
    eager = served.model.forward(inputs, runner.kv, served.lora).clone()
    names = ("token_ids", "positions", "kv_slots", "context_lens", "lora_indices", "page_table")
    static = replace(inputs, **{name: getattr(inputs, name).clone() for name in names})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = served.model.forward(static, runner.kv, served.lora)
    for name in names:  # the same rows in another order
        getattr(static, name).copy_(getattr(inputs, name).flip(0))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(logits.flip(0), eager, rtol=0, atol=0.05)
    for name in names:
        getattr(static, name).copy_(getattr(inputs, name))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(logits, eager)

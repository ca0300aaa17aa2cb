"""bgmv_shrink, the Triton kernel and its torch twin, against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.bgmv_shrink import bgmv_shrink
from kernels.op_configs import trial_config

Shrink = Callable[..., None]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
RANKS = (1, 4, 5, 8, 12, 16, 33, 64, 128)
WIDTHS = (7, 33, 1000, 1024, 14336)


@pytest.fixture(params=["kernel", "twin"])
def shrink(request: pytest.FixtureRequest) -> Shrink:
    return bgmv_shrink if request.param == "kernel" else reference.bgmv_shrink


def run_case(
    shrink: Shrink,
    check: Callable[..., None],
    device: torch.device,
    width: int,
    rank: int,
    indices: list[int],
    input_dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype = BF16,
    index_dtype: torch.dtype = torch.int64,
    four_dims: bool = False,
    scaling: float = 1.0,
    config: dict[str, int] | None = None,
    slots: int = 4,
) -> None:
    """One call with NaN in unused slots, between slots and in the inputs of -1 rows, and guards round the output."""
    arena = torch.full((slots, rank * width + 24), torch.nan, dtype=weight_dtype)
    for slot in {index for index in indices if index >= 0}:
        arena[slot, 8 : 8 + rank * width] = torch.randn(rank * width)
    weights = arena.to(device)[:, 8 : 8 + rank * width].view(slots, rank, width)
    wide = torch.randn(len(indices), width + 8)
    wide[[row for row, index in enumerate(indices) if index < 0]] = torch.nan
    inputs = wide.to(device, input_dtype)[:, :width]
    guarded = torch.randn(len(indices) + 2, rank + 6, device=device)
    before = guarded.clone()
    output = guarded[1:-1, 3 : 3 + rank]
    index = torch.tensor(indices, dtype=index_dtype, device=device)

    shrink(inputs, weights.unsqueeze(1) if four_dims else weights, output, index, scaling, config)

    for row, slot in enumerate(indices):
        if slot >= 0:
            weight, x = weights[slot].double(), inputs[row].double()
            exact, magnitude = scaling * (weight @ x), abs(scaling) * (weight.abs() @ x.abs())
            check(output[row], exact, magnitude, width)
            output[row] = before[1 + row, 3 : 3 + rank]
    assert torch.equal(guarded, before), "something outside the live rows was written"


@pytest.mark.parametrize("indices", [[2, 2, -1, 0, 0], [1, 3, 1, 1], [-1, -1, -1], [3, 3, 3, 3, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("step", [64, 256], ids=["steps", "one step"])
def test_rows_that_share_are_served_alike(
    device: torch.device, assert_rounded_once: Callable[..., None], indices: list[int], step: int
) -> None:
    """In pairs and fours; with the same tiles the bits are those of rows on their own."""
    width, rank = 200, 11
    run_case(partial(bgmv_shrink, shared=True), assert_rounded_once, device, width, rank, indices)
    inputs = torch.randn(len(indices), width).to(device, BF16)
    weights = torch.randn(4, rank, width).to(device, BF16)
    index = torch.tensor(indices, device=device)
    alone = torch.zeros(len(indices), rank, device=device)
    tiles = {"BLOCK_N": 2, "SPLIT_N": 3, "BLOCK_K": step, "num_warps": 4}
    bgmv_shrink(inputs, weights, alone, index, override_config=tiles)
    for rows in (2, 4):
        together = torch.zeros_like(alone)
        with trial_config("shrink_shared", tiles | {"ROWS": rows}):
            bgmv_shrink(inputs, weights, together, index, shared=True)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("split", [1, 3, 8, 40])
def test_programs_need_not_divide_the_rank(
    device: torch.device, assert_rounded_once: Callable[..., None], split: int
) -> None:
    for step in (64, 128):
        config = {"BLOCK_N": 2, "SPLIT_N": split, "BLOCK_K": step}
        run_case(bgmv_shrink, assert_rounded_once, device, 100, 13, [1, -1, 0], config=config)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rank", RANKS)
def test_ranks_and_widths(
    shrink: Shrink, device: torch.device, assert_rounded_once: Callable[..., None], rank: int, width: int
) -> None:
    number = RANKS.index(rank) * len(WIDTHS) + WIDTHS.index(width)
    dtype = (BF16, FP16, FP32)[number % 3]
    run_case(
        shrink,
        assert_rounded_once,
        device,
        width,
        rank,
        [2, -1] if width > 1024 else [1, -1, 3, 1],
        dtype,
        dtype,
        index_dtype=(torch.int64, torch.int32)[number % 2],
        four_dims=number % 4 >= 2,
        # The interpreter takes its time by tile, so that wide inputs get large ones.
        config=None
        if device.type == "cuda" or (rank <= 16 and width <= 1024)
        else {"BLOCK_N": min(1 << (rank - 1).bit_length(), 32), "BLOCK_K": 4096},
    )


@pytest.mark.parametrize("weight_dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("input_dtype", [FP16, BF16, FP32])
def test_dtypes_mix(
    shrink: Shrink,
    device: torch.device,
    assert_rounded_once: Callable[..., None],
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    run_case(shrink, assert_rounded_once, device, 40, 12, [2, 2, -1, 0], input_dtype, weight_dtype, scaling=0.37)


@pytest.mark.parametrize("indices", [[-1, -1], [3, 3, 3], []], ids=str)
def test_indices(
    shrink: Shrink, device: torch.device, assert_rounded_once: Callable[..., None], indices: list[int]
) -> None:
    run_case(shrink, assert_rounded_once, device, 21, 4, indices)


@settings(
    max_examples=8 if torch.cuda.is_available() else 20,  # a GPU compiles nearly every draw anew
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_cases(
    shrink: Shrink, device: torch.device, assert_rounded_once: Callable[..., None], data: st.DataObject
) -> None:
    floats = st.sampled_from([FP16, BF16, FP32])
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    run_case(
        shrink,
        assert_rounded_once,
        device,
        data.draw(st.integers(1, 150)),
        data.draw(st.integers(1, 20)),
        data.draw(st.lists(st.integers(-1, 3), max_size=3)),
        data.draw(floats),
        data.draw(floats),
        data.draw(st.sampled_from([torch.int32, torch.int64])),
        data.draw(st.booleans()),
        data.draw(st.floats(-4, 4, width=32)),
        {"BLOCK_N": data.draw(st.sampled_from([2, 8])), "BLOCK_K": data.draw(st.sampled_from([16, 64, 256]))},
    )


def test_same_bits_every_run_and_in_any_company(shrink: Shrink, device: torch.device) -> None:
    inputs = torch.randn(5, 1000, dtype=torch.float32, device=device).to(BF16)
    weights = torch.randn(3, 8, 1000, device=device).to(BF16)
    indices = torch.tensor([2, 0, 2, 1, 0], device=device)
    first, second = torch.zeros(5, 8, device=device), torch.full((5, 8), 7.0, device=device)
    shrink(inputs, weights, first, indices)
    shrink(inputs, weights, second, indices)
    assert torch.equal(first, second)
    for row in range(5):
        alone = torch.zeros(1, 8, device=device)
        shrink(inputs[row : row + 1], weights, alone, indices[row : row + 1])
        assert torch.equal(alone[0], first[row])


def _good(device: torch.device) -> dict[str, Any]:
    return {
        "inputs": torch.randn(2, 24, device=device),
        "lora_a_weights": torch.randn(3, 4, 24, device=device),
        "output_tensor": torch.zeros(2, 4, device=device),
        "lora_indices_tensor": torch.tensor([0, 2], device=device),
    }


def test_operator_is_registered(device: torch.device) -> None:
    torch.library.opcheck(torch.ops.lorafleet.bgmv_shrink.default, (*_good(device).values(), 0.5, None))


REFUSED: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "16-bit output": ("output_tensor", lambda t: t.half(), "output_tensor has dtype torch.float16"),
    "rank mismatch": ("output_tensor", lambda t: t[:, :3].contiguous(), "3 wide but the rank is 4"),
    "width mismatch": ("inputs", lambda t: t[:, :20], "inputs are 20 wide but lora_a_weights take 24"),
    "batch mismatch": ("inputs", lambda t: t[:1], "output_tensor has 2 rows but .* 1"),
    "strided inputs": ("inputs", lambda t: torch.cat([t, t], 1)[:, ::2], "inputs .* not contiguous"),
    "int weights": ("lora_a_weights", lambda t: t.int(), "lora_a_weights has dtype torch.int32"),
    "permuted weights": ("lora_a_weights", lambda t: t.mT.contiguous().mT, "not contiguous"),
    "devices": ("output_tensor", lambda t: t.to("meta"), "output_tensor is on meta"),
    "unknown key": ("override_config", lambda _: {"SPLIT_K": 4}, "unknown key 'SPLIT_K'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_value(device: torch.device, name: str) -> None:
    key, change, message = REFUSED[name]
    arguments = _good(device)
    arguments[key] = change(arguments.get(key, torch.empty(0)))
    with pytest.raises(ValueError, match=message):
        bgmv_shrink(**arguments)


@pytest.mark.parametrize("index", [-7, 3])
def test_index_out_of_range_is_refused_on_a_cpu(index: int) -> None:
    arguments = _good(torch.device("cpu"))
    arguments["lora_indices_tensor"][0] = index
    with pytest.raises(ValueError, match=f"row 0 has adapter index {index}"):
        bgmv_shrink(**arguments)

"""bgmv_expand, the Triton kernel and its torch twin, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.bgmv_expand import bgmv_expand
from kernels.op_configs import trial_config

Expand = Callable[..., None]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
RANKS = (1, 4, 5, 8, 12, 16, 33, 64, 128)
HIDDENS = (7, 33, 1000, 1024, 14336)


@pytest.fixture(params=["kernel", "twin"])
def expand(request: pytest.FixtureRequest) -> Expand:
    return bgmv_expand if request.param == "kernel" else reference.bgmv_expand


@dataclass
class Case:
    """One call on NaN-poisoned surroundings: unused slots, gaps between slots, inputs of -1 rows, output guards."""

    inputs: Tensor
    weights: Tensor
    output: Tensor
    indices: Tensor
    guarded: Tensor  # the memory that ``output`` is a window of

    @classmethod
    def make(
        cls,
        device: torch.device,
        hidden: int,
        rank: int,
        indices: list[int],
        input_dtype: torch.dtype = FP32,
        weight_dtype: torch.dtype = BF16,
        output_dtype: torch.dtype = BF16,
        index_dtype: torch.dtype = torch.int64,
        four_dims: bool = False,
        slots: int = 5,
    ) -> Case:
        arena = torch.full((slots, hidden * rank + 24), torch.nan, dtype=weight_dtype)
        for slot in {index for index in indices if index >= 0}:
            arena[slot, 8 : 8 + hidden * rank] = torch.randn(hidden * rank)
        weights = arena.to(device)[:, 8 : 8 + hidden * rank].view(slots, hidden, rank)  # slot stride > its size
        inputs = torch.randn(len(indices), rank).to(input_dtype)
        inputs[[row for row, index in enumerate(indices) if index < 0]] = torch.nan
        guarded = torch.randn(len(indices) + 2, hidden + 6).to(device, output_dtype)
        return cls(
            inputs.to(device),
            weights.unsqueeze(1) if four_dims else weights,
            guarded[1:-1, 3 : 3 + hidden],
            torch.tensor(indices, dtype=index_dtype, device=device),
            guarded,
        )

    def run(self, expand: Expand, check: Callable[..., None], add: bool, config: dict[str, int] | None = None) -> None:
        before = self.guarded.clone()
        hidden, rank = self.weights.shape[-2:]
        exact = before[1:-1, 3 : 3 + hidden].double()
        magnitude = exact.abs()
        for row, index in enumerate(self.indices.tolist()):
            if index >= 0:
                weight, x = self.weights.view(-1, hidden, rank)[index].double(), self.inputs[row].double()
                exact[row] = exact[row] * add + weight @ x
                magnitude[row] = magnitude[row] * add + weight.abs() @ x.abs()
        expand(self.inputs, self.weights, self.output, self.indices, add, config)
        live = self.indices >= 0
        check(self.output[live], exact[live], magnitude[live], rank)
        self.output[live] = before[1:-1, 3 : 3 + hidden][live]
        assert torch.equal(self.guarded, before), "something outside the live rows was written"


def split_for(device: torch.device, hidden: int, number: int) -> dict[str, int] | None:
    """Default launch parameters for narrow outputs; large tiles for wide ones, which the interpreter takes by tile."""
    if hidden <= 33:
        return None
    block = 64 if device.type == "cuda" else 256 if hidden <= 1024 else 8192
    return {"BLOCK_N": block, "SPLIT_N": (1, 2, 3, 5)[number % 4]}


@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("rank", RANKS)
def test_ranks_and_widths(
    expand: Expand, device: torch.device, assert_rounded_once: Callable[..., None], rank: int, hidden: int
) -> None:
    number = RANKS.index(rank) * len(HIDDENS) + HIDDENS.index(hidden)
    wide = hidden > 1024
    case = Case.make(
        device,
        hidden,
        rank,
        [3, -1, 0] if wide else [1, -1, 3, 1],
        input_dtype=(FP32, BF16, FP16)[number % 3],
        weight_dtype=(BF16, FP16)[number % 2],
        output_dtype=(BF16, FP16, FP32)[(number // 3) % 3],
        index_dtype=(torch.int64, torch.int32)[number % 2],
        four_dims=number % 4 >= 2,
        slots=4,
    )
    case.run(expand, assert_rounded_once, add=number % 5 != 0, config=split_for(device, hidden, number))


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("output_dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("weight_dtype", [FP16, BF16])
@pytest.mark.parametrize("input_dtype", [FP16, BF16, FP32])
def test_dtypes(
    expand: Expand,
    device: torch.device,
    assert_rounded_once: Callable[..., None],
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype,
    add: bool,
) -> None:
    case = Case.make(device, 40, 12, [2, 2, -1, 0], input_dtype, weight_dtype, output_dtype)
    case.run(expand, assert_rounded_once, add)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("indices", [[-1, -1, -1], [4, 4, 4], [0, 1, 2, 3, 4], [-1, 2, -1], []], ids=str)
def test_indices(
    expand: Expand,
    device: torch.device,
    assert_rounded_once: Callable[..., None],
    indices: list[int],
    add: bool,
    index_dtype: torch.dtype,
) -> None:
    case = Case.make(device, 21, 4, indices, index_dtype=index_dtype)
    case.run(expand, assert_rounded_once, add)


@pytest.mark.parametrize("indices", [[2, 2, -1, 0, 0], [1, 3, 1, 1], [-1, -1, -1], [4, 4, 4, 4, 4, 4, 4]], ids=str)
def test_rows_that_share_are_served_alike(
    device: torch.device, assert_rounded_once: Callable[..., None], indices: list[int]
) -> None:
    """In pairs and fours; with the same tiles the bits are those of rows on their own."""
    case = Case.make(device, 100, 16, indices)
    case.run(partial(bgmv_expand, shared=True), assert_rounded_once, add=True)
    alone, tiles = case.output.clone(), {"BLOCK_N": 32, "SPLIT_N": 2, "num_warps": 4}
    bgmv_expand(case.inputs, case.weights, alone, case.indices, override_config=tiles)
    for rows in (2, 4):
        together = case.output.clone()
        with trial_config("expand_shared", tiles | {"ROWS": rows}):
            bgmv_expand(case.inputs, case.weights, together, case.indices, shared=True)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("split", [1, 3, 7, 8, 64, 200])
@pytest.mark.parametrize(("hidden", "block"), [(100, 16), (33, 64), (1, 4), (129, 1)])
def test_split_need_not_divide_hidden(
    device: torch.device, assert_rounded_once: Callable[..., None], hidden: int, block: int, split: int
) -> None:
    if split == 200 and hidden > 100:
        hidden = 7  # more programs than columns, and few enough of them
    case = Case.make(device, hidden, 8, [0, -1])
    case.run(bgmv_expand, assert_rounded_once, add=True, config={"BLOCK_N": block, "SPLIT_N": split})


def test_sums_are_fp32(expand: Expand, device: torch.device, assert_rounded_once: Callable[..., None]) -> None:
    """Large terms that cancel: with 16-bit products or sums the small remainder is lost."""
    case = Case.make(device, 64, 64, [0, 1], BF16, BF16, FP32)
    case.weights[:2, :, 1::2] = -case.weights[:2, :, ::2]
    case.inputs[:, 1::2] = case.inputs[:, ::2] * (1 + 2**-7)
    case.run(expand, assert_rounded_once, add=False)


def test_slot_offsets_past_two_to_the_31(
    expand: Expand, device: torch.device, assert_rounded_once: Callable[..., None]
) -> None:
    """int32 index times an int32 stride would wrap; only the touched pages of this arena take memory on a CPU."""
    hidden, rank, stride = 16, 8, 2**30 + 8
    arena = torch.empty(2 * stride + hidden * rank, dtype=BF16, device=device)
    weights = arena.as_strided((3, hidden, rank), (stride, rank, 1))
    weights[2] = torch.randn(hidden, rank).to(device)
    case = Case.make(device, hidden, rank, [2, -1], index_dtype=torch.int32, slots=3)
    case.inputs[0] = torch.randn(rank).to(device)
    case.weights = weights
    exact = case.output[0].double() + weights[2].double() @ case.inputs[0].double()
    expand(case.inputs, weights, case.output, case.indices)
    assert_rounded_once(case.output[:1], exact[None], exact.abs()[None] + 40, rank)


def test_a_row_is_the_same_bits_in_any_company(expand: Expand, device: torch.device) -> None:
    case = Case.make(device, 40, 12, [2, 0, 2, 1, 3])
    together = torch.zeros(5, 40, dtype=BF16, device=device)
    expand(case.inputs, case.weights, together, case.indices)
    for row in range(5):
        alone = torch.zeros(1, 40, dtype=BF16, device=device)
        expand(case.inputs[row : row + 1], case.weights, alone, case.indices[row : row + 1])
        assert torch.equal(alone[0], together[row])


@settings(
    max_examples=8 if torch.cuda.is_available() else 30,  # a GPU compiles nearly every draw anew
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_cases(device: torch.device, assert_rounded_once: Callable[..., None], data: st.DataObject) -> None:
    hidden, rank = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    case = Case.make(
        device,
        hidden,
        rank,
        data.draw(st.lists(st.integers(-1, 3), max_size=3)),
        data.draw(st.sampled_from([FP16, BF16, FP32])),
        data.draw(st.sampled_from([FP16, BF16])),
        data.draw(st.sampled_from([FP16, BF16, FP32])),
        data.draw(st.sampled_from([torch.int32, torch.int64])),
        data.draw(st.booleans()),
    )
    config = {
        "BLOCK_N": data.draw(st.sampled_from([1, 8, 32, 128])),
        "SPLIT_N": data.draw(st.integers(1, 6)),
        "num_warps": 4,
    }
    add = data.draw(st.booleans())
    for implementation in (bgmv_expand, reference.bgmv_expand):
        copy = Case(case.inputs, case.weights, case.output, case.indices, case.guarded.clone())
        copy.output = copy.guarded[1:-1, 3 : 3 + hidden]
        copy.run(implementation, assert_rounded_once, add, config)


def test_operator_is_registered(device: torch.device) -> None:
    for four_dims, config in ((False, None), (True, [16, 2, 0, 0])):
        case = Case.make(device, 33, 5, [1, -1, 2], four_dims=four_dims)
        torch.library.opcheck(
            torch.ops.lorafleet.bgmv_expand.default,
            (case.inputs, case.weights.nan_to_num(), case.output, case.indices, True, config),
        )


def test_torch_compile_sees_one_operation(device: torch.device) -> None:
    case = Case.make(device, 33, 5, [1, -1, 2])
    case.inputs = case.inputs.nan_to_num()

    def step(output: Tensor) -> Tensor:
        bgmv_expand(case.inputs, case.weights, output, case.indices, override_config={"SPLIT_N": 2})
        return output * 2

    expected, got = case.output.clone(), case.output.clone()
    bgmv_expand(case.inputs, case.weights, expected, case.indices)
    doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(got)
    assert torch.equal(got, expected)
    assert torch.equal(doubled, expected * 2)


@pytest.mark.gpu
def test_cuda_graph_reads_indices_at_replay(device: torch.device) -> None:
    case = Case.make(device, 256, 16, [0, 1, 2])
    case.inputs = torch.randn(3, 16, device=device)
    bgmv_expand(case.inputs, case.weights, case.output, case.indices, add_inputs=False)  # compiled before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bgmv_expand(case.inputs, case.weights, case.output, case.indices, add_inputs=False)
    case.indices.copy_(torch.tensor([-1, 0, 0]))
    before = case.output.clone()
    graph.replay()
    expected = before.clone()
    bgmv_expand(case.inputs, case.weights, expected, case.indices, add_inputs=False)
    assert torch.equal(case.output, expected)
    assert torch.equal(case.output[0], before[0])


def _good(device: torch.device) -> dict[str, Any]:
    case = Case.make(device, 16, 4, [0, 1])
    return {
        "inputs": case.inputs,
        "lora_b_weights": case.weights,
        "output_tensor": case.output,
        "lora_indices_tensor": case.indices,
    }


REFUSED: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "1-D inputs": ({"inputs": lambda t: t[0]}, r"inputs has shape \(4,\)"),
    "fp64 inputs": ({"inputs": lambda t: t.double()}, "inputs has dtype torch.float64"),
    "fp32 weights": (
        {"lora_b_weights": lambda t: t.float()},
        "dtype torch.float32; convert it to one of torch.float16",
    ),
    "2-D weights": ({"lora_b_weights": lambda t: t[0]}, r"lora_b_weights has shape \(16, 4\)"),
    "second dim not 1": ({"lora_b_weights": lambda t: torch.stack([t, t], 1)}, r"\(5, 2, 16, 4\)"),
    "transposed weights": ({"lora_b_weights": lambda t: t.mT.contiguous().mT}, "not contiguous"),
    "strided weights": ({"lora_b_weights": lambda t: t[:, ::2], "output_tensor": lambda t: t[:, ::2]}, "contiguous"),
    "no rank": ({"inputs": lambda t: t[:, :0], "lora_b_weights": lambda t: t[:, :, :0]}, "empty dimension"),
    "rank mismatch": ({"inputs": lambda t: t[:, :3]}, "3 wide but lora_b_weights have rank 4"),
    "width mismatch": ({"output_tensor": lambda t: t[:, :9]}, "9 wide but lora_b_weights have 16"),
    "batch mismatch": ({"output_tensor": lambda t: t[:1]}, "output_tensor has 1 rows but .* 2"),
    "indices mismatch": ({"lora_indices_tensor": lambda t: t[:1]}, "lora_indices_tensor has 1 rows but .* 2"),
    "float indices": ({"lora_indices_tensor": lambda t: t.float()}, "lora_indices_tensor has dtype torch.float32"),
    "2-D indices": ({"lora_indices_tensor": lambda t: t[None]}, "lora_indices_tensor has shape"),
    "int output": ({"output_tensor": lambda t: t.int()}, "output_tensor has dtype torch.int32"),
    "strided output": (
        {"output_tensor": lambda t: torch.zeros(2, 32, dtype=t.dtype, device=t.device)[:, ::2]},
        "output_tensor .* not contiguous",
    ),
    "overlapping output": ({"output_tensor": lambda t: t[:1].expand(2, 16)}, "rows of output_tensor overlap"),
    "devices": ({"lora_b_weights": lambda t: t.to("meta")}, "lora_b_weights is on meta"),
    "unknown key": ({"override_config": lambda _: {"SPLIT_K": 2}}, "unknown key 'SPLIT_K'; it takes BLOCK_N, SPLIT_N"),
    "zero split": ({"override_config": lambda _: {"SPLIT_N": 0}}, r"override_config\['SPLIT_N'\] is 0"),
    "block no power of two": (
        {"override_config": lambda _: {"BLOCK_N": 48}},
        r"'BLOCK_N'\] is 48; give a power of two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_value_and_the_remedy(device: torch.device, name: str) -> None:
    changes, message = REFUSED[name]
    arguments = _good(device)
    for key, change in changes.items():
        arguments[key] = change(arguments.get(key))
    output = arguments["output_tensor"].clone()
    with pytest.raises(ValueError, match=message):
        bgmv_expand(**arguments)
    assert torch.equal(arguments["output_tensor"], output)


@pytest.mark.parametrize("index", [-2, 5])
def test_index_out_of_range_is_refused_on_a_cpu(index: int) -> None:
    arguments = _good(torch.device("cpu"))
    arguments["lora_indices_tensor"][1] = index
    with pytest.raises(ValueError, match=f"row 1 has adapter index {index}; .* 5 slots"):
        bgmv_expand(**arguments)


def test_batch_past_the_grid_is_refused(device: torch.device) -> None:
    inputs = torch.zeros(1, 1, device=device).expand(65536, 1)
    with pytest.raises(ValueError, match="65536 exceeds the 65535 rows"):
        bgmv_expand(
            inputs,
            torch.zeros(1, 1, 1, dtype=BF16, device=device),
            torch.zeros(65536, 1, device=device),
            torch.zeros(65536, dtype=torch.int64, device=device),
        )

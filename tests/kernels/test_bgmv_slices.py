"""The packed-slice kernels over a slot table, and their torch twins, against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.bgmv_expand import bgmv_expand, bgmv_expand_slices
from kernels.bgmv_shrink import bgmv_shrink, bgmv_shrink_slices
from kernels.lora_group import LoraGroup, packed_rank

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
KERNELS = SimpleNamespace(expand=bgmv_expand_slices, shrink=bgmv_shrink_slices)
TWINS = SimpleNamespace(expand=reference.bgmv_expand_slices, shrink=reference.bgmv_shrink_slices)
QKV = LoraGroup(unit=11, in_features=48, out_features=(150, 33, 7))
GATE_UP = LoraGroup(unit=0, in_features=33, out_features=(64, 130))
DOWN = LoraGroup(unit=1000, in_features=1000, out_features=(33,))
FOUR = LoraGroup(unit=5, in_features=7, out_features=(1, 256, 40, 16))


@pytest.fixture(params=["kernel", "twin"])
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    return KERNELS if request.param == "kernel" else TWINS


def check_shrink(
    ops: SimpleNamespace,
    check: Callable[..., None],
    packed: Any,
    indices: list[int],
    input_dtype: torch.dtype,
    index_dtype: torch.dtype = torch.int32,
    config: dict[str, int] | None = None,
) -> None:
    group, device, max_rank = packed.group, packed.arena.device, packed_rank(max(packed.ranks)) + 3
    wide = torch.randn(len(indices), group.in_features + 5)
    wide[[row for row, index in enumerate(indices) if index < 0]] = torch.nan
    inputs = wide.to(device, input_dtype)[:, : group.in_features]
    output = torch.full((group.splits, group.slices, len(indices), max_rank), 7.0, device=device)
    index = torch.tensor(indices, dtype=index_dtype, device=device)
    ops.shrink(inputs, packed.arena, packed.slot_table, output, index, group, override_config=config)
    for row, slot in enumerate(indices):
        rank = packed.ranks[slot] if slot >= 0 else 0
        if slot >= 0:
            x = inputs[row].double()
            got = output[:, :, row, :rank].sum(0)
            check(got, packed.a[slot] @ x, packed.a[slot].abs() @ x.abs(), group.in_features)
        assert not output[:, :, row, rank : packed_rank(rank)].any()
        assert (output[:, :, row, packed_rank(rank) :] == 7).all(), (
            "columns past the adapter's packed rank were written"
        )


def check_expand(
    ops: SimpleNamespace,
    check: Callable[..., None],
    packed: Any,
    indices: list[int],
    output_dtype: torch.dtype,
    add: bool,
    index_dtype: torch.dtype = torch.int64,
    config: dict[str, int] | None = None,
    splits: int = 1,
) -> None:
    group, device, max_rank = packed.group, packed.arena.device, packed_rank(max(packed.ranks)) + 3
    inputs = torch.full((splits, group.slices, len(indices), max_rank), torch.nan)
    for row, slot in enumerate(indices):
        if slot >= 0:  # what lies past the adapter's packed rank stays NaN
            rank = packed.ranks[slot]
            inputs[:, :, row, : packed_rank(rank)] = 0
            inputs[:, :, row, :rank] = torch.randn(splits, group.slices, rank)
    inputs = inputs.to(device)
    output = torch.randn(len(indices), group.out_total + 9).to(device, output_dtype)
    before = output.clone()
    index = torch.tensor(indices, dtype=index_dtype, device=device)
    ops.expand(inputs, packed.arena, packed.slot_table, output, index, group, add, override_config=config)
    for row, slot in enumerate(indices):
        if slot >= 0:
            hidden = inputs[:, :, row, : packed.ranks[slot]].sum(0).double()
            old = before[row, : group.out_total].double() * add
            exact = old + torch.cat([b @ x for b, x in zip(packed.b[slot], hidden, strict=True)])
            size = old.abs() + torch.cat([b.abs() @ x.abs() for b, x in zip(packed.b[slot], hidden, strict=True)])
            check(output[row, : group.out_total], exact, size, packed.ranks[slot])
            output[row, : group.out_total] = before[row, : group.out_total]
    assert torch.equal(output, before), "something outside the live rows was written"


@pytest.mark.parametrize("group", [QKV, GATE_UP, DOWN, FOUR], ids=["qkv", "gate_up", "down", "four"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_mixed_ranks(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    dtype: torch.dtype,
    group: LoraGroup,
) -> None:
    packed = pack_adapters(group, (4, 16, 1, 19), dtype)
    check_shrink(ops, assert_rounded_once, packed, [1, -1, 0, 3], dtype)
    check_expand(ops, assert_rounded_once, packed, [3, 1, -1, 0, 2], dtype, add=True)
    check_expand(ops, assert_rounded_once, packed, [1, -1, 2], dtype, add=False, index_dtype=torch.int32)


@pytest.mark.parametrize("rank", [1, 4, 5, 8, 12, 16, 33, 64, 128])
def test_every_rank(
    ops: SimpleNamespace, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any], rank: int
) -> None:
    packed = pack_adapters(QKV, (rank, 3), BF16)
    check_shrink(ops, assert_rounded_once, packed, [0, -1], FP32)
    check_expand(ops, assert_rounded_once, packed, [-1, 0], FP16, add=True)


def test_wide_group(
    ops: SimpleNamespace, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any]
) -> None:
    packed = pack_adapters(LoraGroup(3, 4100, (14336, 1024)), (8, 5), BF16)
    assert packed.group.splits == 3, "the parts differ in width"
    check_shrink(ops, assert_rounded_once, packed, [0, 1], BF16)
    config = None if packed.arena.is_cuda else {"BLOCK_N": 4096}  # the interpreter takes its time by tile
    check_expand(ops, assert_rounded_once, packed, [1, 0], BF16, True, config=config, splits=3)


@pytest.mark.parametrize("indices", [[-1, -1, -1], [2, 2, 2], []], ids=str)
def test_indices(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    indices: list[int],
) -> None:
    packed = pack_adapters(GATE_UP, (4, 16, 5), FP32)
    check_shrink(ops, assert_rounded_once, packed, indices, FP32)
    check_expand(ops, assert_rounded_once, packed, indices, FP32, add=True)


@settings(
    max_examples=8 if torch.cuda.is_available() else 15,  # a GPU compiles nearly every draw anew
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_groups(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    data: st.DataObject,
) -> None:
    small = st.integers(1, 70)
    group = LoraGroup(
        data.draw(st.integers(0, 50)), data.draw(small), tuple(data.draw(st.lists(small, min_size=1, max_size=4)))
    )
    floats = st.sampled_from([FP16, BF16, FP32])
    ranks = tuple(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3)))
    indices = data.draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    packed = pack_adapters(group, ranks, data.draw(floats))
    step = data.draw(st.sampled_from([4, 16]))
    check_shrink(ops, assert_rounded_once, packed, indices, data.draw(floats), config={"BLOCK_N": step})
    check_expand(
        ops,
        assert_rounded_once,
        packed,
        indices,
        data.draw(floats),
        data.draw(st.booleans()),
        config={"BLOCK_N": 64, "BLOCK_K": step},
        splits=data.draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_same_bits_in_any_slot_and_company(
    ops: SimpleNamespace, device: torch.device, pack_adapters: Callable[..., Any], dtype: torch.dtype
) -> None:
    """Moving the adapters, also to the least aligned addresses, and changing the batch changes no bit of a row."""
    group = LoraGroup(unit=8, in_features=40, out_features=(24, 9))
    span = group.unit + group.size
    x = torch.randn(3, group.in_features).to(device, dtype)

    def delta(packed: Any, rows: slice, slots: list[int]) -> torch.Tensor:
        index = torch.tensor(slots, device=device)[rows]
        hidden = torch.full((1, group.slices, len(index), 16), torch.nan, device=device)
        ops.shrink(x[rows], packed.arena, packed.slot_table, hidden, index, group)
        out = torch.ones(len(index), group.out_total, dtype=dtype, device=device)
        ops.expand(hidden, packed.arena, packed.slot_table, out, index, group)
        return out

    results = []
    for offsets, slots in (([0, 16 * span + 32], [0, 1, 1]), ([8 * span + 72, 8], [1, 0, 0])):
        torch.manual_seed(7)  # the same two adapters
        packed = pack_adapters(group, (16, 8), dtype, offsets)
        if slots[0] == 1:
            packed.slot_table[[0, 1]] = packed.slot_table[[1, 0]]
        results.append(delta(packed, slice(0, 3), slots))
        for row in range(3):
            assert torch.equal(delta(packed, slice(row, row + 1), slots)[0], results[-1][row])
    assert torch.equal(results[0], results[1])


def test_slices_agree_with_the_single_kernels(
    device: torch.device, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any]
) -> None:
    packed = pack_adapters(QKV, (8,), BF16)
    x = torch.randn(2, QKV.in_features).to(device, BF16)
    index = torch.tensor([0, -1], device=device)
    hidden = torch.zeros(1, QKV.slices, 2, 8, device=device)
    bgmv_shrink_slices(x, packed.arena, packed.slot_table, hidden, index, QKV)
    for part in range(QKV.slices):
        single = torch.zeros(2, 8, device=device)
        bgmv_shrink(x, packed.a[0][part][None].to(BF16), single, index)
        weight, row = packed.a[0][part], x[0].double()
        assert_rounded_once(single[:1], (weight @ row)[None], (weight.abs() @ row.abs())[None], QKV.in_features)
        torch.testing.assert_close(hidden[0, part], single, rtol=1e-5, atol=1e-5)
        out = torch.zeros(2, QKV.out_features[part], device=device)
        bgmv_expand(hidden[0, part], packed.b[0][part][None].to(BF16), out, index)
        packed_out = torch.zeros(2, QKV.out_total, device=device)
        bgmv_expand_slices(hidden, packed.arena, packed.slot_table, packed_out, index, QKV)
        first = QKV.out_start(part)
        torch.testing.assert_close(packed_out[:, first : first + out.shape[1]], out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("width", [40, 700, 4096])
def test_tile_height_changes_no_bit(
    device: torch.device, pack_adapters: Callable[..., Any], width: int, dtype: torch.dtype
) -> None:
    """A tuned table may choose BLOCK_N by the batch."""
    packed = pack_adapters(LoraGroup(8, width, (64, 32)), (16, 8), dtype, [0, 16 * (8 + 2 * width + 96)])
    group, x = packed.group, torch.randn(2, width).to(device, dtype)
    index = torch.tensor([0, 1], device=device)
    results = []
    for rows, columns in ((1, 64), (2, 128), (4, 256), (16, 512)):
        hidden = torch.zeros(group.splits, group.slices, 2, 16, device=device)
        out = torch.ones(2, group.out_total, dtype=dtype, device=device)
        slots = (index, group)
        bgmv_shrink_slices(x, packed.arena, packed.slot_table, hidden, *slots, override_config={"BLOCK_N": rows})
        bgmv_expand_slices(
            hidden, packed.arena, packed.slot_table, out, *slots, override_config={"BLOCK_N": columns, "num_warps": 2}
        )
        results.append((hidden, out))
    for hidden, out in results[1:]:
        assert torch.equal(hidden, results[0][0])
        assert torch.equal(out, results[0][1])


def _operands(pack_adapters: Callable[..., Any]) -> dict[str, Any]:
    packed = pack_adapters(GATE_UP, (4, 8), FP32)
    device = packed.arena.device
    return {
        "inputs": torch.randn(1, 2, 3, 8, device=device),
        "arena": packed.arena.nan_to_num(),
        "slot_table": packed.slot_table,
        "output": torch.zeros(3, GATE_UP.out_total, device=device),
        "lora_indices": torch.tensor([1, -1, 0], device=device),
        "group": GATE_UP,
    }


def test_operators_are_registered(pack_adapters: Callable[..., Any]) -> None:
    given_ = _operands(pack_adapters)
    group, tail = given_.pop("group"), (GATE_UP.unit, GATE_UP.in_features, list(GATE_UP.out_features))
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.lorafleet
    torch.library.opcheck(
        operators.bgmv_expand_slices.default, (*given_.values(), *tail, True, False, None), test_utils=tests
    )
    given_["inputs"] = torch.randn(3, group.in_features, device=given_["arena"].device)
    given_["output"] = torch.zeros(1, 2, 3, 8, device=given_["arena"].device)
    torch.library.opcheck(
        operators.bgmv_shrink_slices.default, (*given_.values(), *tail, False, None), test_utils=tests
    )


@pytest.mark.gpu
def test_cuda_graph_reads_the_slot_table_at_replay(device: torch.device, pack_adapters: Callable[..., Any]) -> None:
    packed = pack_adapters(QKV, (16, 4), BF16)
    x = torch.randn(2, QKV.in_features).to(device, BF16)
    index = torch.tensor([0, 1], device=device, dtype=torch.int32)
    hidden = torch.zeros(1, QKV.slices, 2, 16, device=device)
    out = torch.zeros(2, QKV.out_total, device=device, dtype=BF16)

    def step() -> None:
        bgmv_shrink_slices(x, packed.arena, packed.slot_table, hidden, index, QKV)
        bgmv_expand_slices(hidden, packed.arena, packed.slot_table, out, index, QKV, add_inputs=False)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    packed.slot_table[[0, 1]] = packed.slot_table[[1, 0]]
    step()
    expected = out.clone()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_overlapped_launches_keep_the_streams_order(device: torch.device, pack_adapters: Callable[..., Any]) -> None:
    """A launch in which no row has an adapter, between a slow writer and a reader, lets neither pass the other."""
    packed = pack_adapters(LoraGroup(8, 4096, (4096,)), (16, 16), BF16)
    state, group = (packed.arena, packed.slot_table), packed.group
    live, none = torch.zeros(64, dtype=torch.int32, device=device), torch.full((64,), -1, device=device)
    x, source = torch.randn(64, 4096).to(device, BF16), torch.randn(64, 4096).to(device, BF16)
    large = torch.randn(6144, 6144, device=device, dtype=BF16)

    def run(overlap: bool) -> torch.Tensor:
        hidden = torch.zeros(group.splits, 1, 64, 16, device=device)
        out = torch.zeros(64, 4096, device=device, dtype=BF16)
        for turn in range(20):
            large @ large  # the queue fills behind it, so that launches follow each other at once
            torch.add(source, float(turn), out=x)
            bgmv_expand_slices(hidden, *state, out, none, group, operands_ready=overlap)
            bgmv_shrink_slices(x, *state, hidden, none, group, operands_ready=overlap)
            bgmv_shrink_slices(x, *state, hidden, live, group, operands_ready=overlap)
            bgmv_expand_slices(hidden, *state, out, none, group, operands_ready=overlap)
            bgmv_expand_slices(hidden, *state, out, live, group, operands_ready=overlap)
        return out

    expected = run(overlap=False)
    for _ in range(5):
        assert torch.equal(run(overlap=True), expected)


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits(device: torch.device, pack_adapters: Callable[..., Any]) -> None:
    packed = pack_adapters(LoraGroup(8, 14336, (4096, 1024)), (16, 8, 64), BF16)
    x, group = torch.randn(9, 14336).to(device, BF16), packed.group
    index = torch.tensor([0, 1, 2, -1, 2, 1, 0, 0, 2], device=device, dtype=torch.int32)
    first = None
    for _ in range(100):
        hidden = torch.zeros(group.splits, group.slices, 9, 64, device=device)
        out = torch.ones(9, group.out_total, device=device, dtype=BF16)
        bgmv_shrink_slices(x, packed.arena, packed.slot_table, hidden, index, group, operands_ready=True)
        bgmv_expand_slices(hidden, packed.arena, packed.slot_table, out, index, group, operands_ready=True)
        first = out if first is None else first
        assert torch.equal(out, first)


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "16-bit intermediate": ("inputs", lambda t: t.half(), "inputs has dtype torch.float16"),
    "slices": ("inputs", lambda t: t[:, :1], "inputs hold 1 slices but the group has 2"),
    "narrow output": ("output", lambda t: t[:, :100], "output is 100 wide"),
    "batch": ("lora_indices", lambda t: t[:2], "lora_indices has 2 rows but .* 3"),
    "2-D arena": ("arena", lambda t: t[None], "arena has shape"),
    "int arena": ("arena", lambda t: t.int(), "arena has dtype torch.int32"),
    "int32 table": ("slot_table", lambda t: t.int(), "slot_table has dtype torch.int32"),
    "table columns": ("slot_table", lambda t: t.repeat(1, 2), r"slot_table has shape \(3, 4\)"),
    "too many slices": ("group", lambda _: LoraGroup(0, 8, (1, 1, 1, 1, 1)), "a group of 5 slices"),
    "unpadded rank": (
        "slot_table",
        lambda t: t.cpu() - 1,
        "slot 0 has offset 7 and rank 7; pack adapters at multiples of 8",
    ),
    "slot number": ("lora_indices", lambda t: t.cpu() + 2, "row 0 has adapter index 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_expand_refusals(pack_adapters: Callable[..., Any], device: torch.device, name: str) -> None:
    key, change, message = REFUSED[name]
    arguments = _operands(pack_adapters)
    arguments[key] = change(arguments[key])
    if name in {"slot number", "unpadded rank"}:  # contents are read on a CPU alone
        arguments = {k: v if isinstance(v, LoraGroup) else v.cpu() for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        bgmv_expand_slices(**arguments)


def test_shrink_refusals(pack_adapters: Callable[..., Any]) -> None:
    arguments = _operands(pack_adapters)
    device = arguments["arena"].device
    arguments["inputs"] = torch.randn(3, GATE_UP.in_features, device=device)
    arguments["output"] = torch.zeros(1, 2, 3, 8, device=device)
    bgmv_shrink_slices(**arguments)
    with pytest.raises(ValueError, match="inputs are 9 wide but the group takes 33"):
        bgmv_shrink_slices(**arguments | {"inputs": arguments["inputs"][:, :9]})
    with pytest.raises(ValueError, match="output holds 1 slices but the group has 2"):
        bgmv_shrink_slices(**arguments | {"output": arguments["output"][:, :1]})
    with pytest.raises(ValueError, match="output holds 2 splits but an input 33 wide makes 1"):
        bgmv_shrink_slices(**arguments | {"output": arguments["output"].expand(2, -1, -1, -1)})
    with pytest.raises(ValueError, match=r"output has dtype torch\.bfloat16"):
        bgmv_shrink_slices(**arguments | {"output": arguments["output"].bfloat16()})
    with pytest.raises(ValueError, match=r"output has 2 rows but .* 3"):
        bgmv_shrink_slices(**arguments | {"output": arguments["output"][:, :, :2]})
    with pytest.raises(ValueError, match="rows of output overlap"):
        bgmv_shrink_slices(**arguments | {"output": arguments["output"][:, :, :1].expand(1, 2, 3, 8)})

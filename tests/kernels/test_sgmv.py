"""The segmented kernels of prefill and their torch twins, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference, sgmv
from kernels.dispatch import interpreter_on
from kernels.lora_group import LoraGroup, packed_rank
from kernels.sgmv import sgmv_expand, sgmv_shrink

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
KERNELS = SimpleNamespace(shrink=sgmv_shrink, expand=sgmv_expand)
TWINS = SimpleNamespace(shrink=reference.sgmv_shrink, expand=reference.sgmv_expand)
QKV = LoraGroup(unit=11, in_features=48, out_features=(70, 33, 7))
DOWN = LoraGroup(unit=100, in_features=1000, out_features=(33,))
GATE_UP = LoraGroup(unit=0, in_features=33, out_features=(40, 130))


@pytest.fixture(params=["kernel", "twin"])
def ops(request: pytest.FixtureRequest) -> SimpleNamespace:
    return KERNELS if request.param == "kernel" else TWINS


def check_both(
    ops: SimpleNamespace,
    check: Callable[..., None],
    packed: Any,
    starts: list[int],
    indices: list[int],
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    add: bool = True,
    index_dtype: torch.dtype = torch.int32,
    tail: int = 3,
) -> None:
    """Shrink, then expand, ``tail`` tokens past the last segment; what no live segment covers is NaN or untouched."""
    group, device, tokens = packed.group, packed.arena.device, starts[-1] + tail
    stored = [packed_rank(rank) for rank in packed.ranks]
    max_rank = max(stored) + 3
    segments = [slice(starts[i], starts[i + 1]) for i in range(len(indices))]
    live = [(part, slot) for part, slot in zip(segments, indices, strict=True) if slot >= 0]
    x = torch.full((tokens, group.in_features + 5), torch.nan)
    for part, _ in live:
        x[part] = torch.randn(part.stop - part.start, group.in_features + 5)
    x = x.to(device, input_dtype)[:, : group.in_features]
    where = torch.tensor(starts, dtype=torch.int32, device=device)
    index = torch.tensor(indices, dtype=index_dtype, device=device)
    longest = max((part.stop - part.start for part in segments), default=0)

    hidden = torch.full((group.slices, tokens, max_rank), torch.nan, device=device)
    ops.shrink(x, packed.arena, packed.slot_table, hidden, where, index, group, longest)
    written = torch.zeros_like(hidden, dtype=torch.bool)
    for part, slot in live:
        rank, rows = packed.ranks[slot], x[part].double().T
        got = hidden[:, part, :rank].mT.contiguous()
        check(got, packed.a[slot] @ rows, packed.a[slot].abs() @ rows.abs(), group.in_features)
        assert not hidden[:, part, rank : stored[slot]].any(), "padding is zero"
        written[:, part, : stored[slot]] = True
    assert torch.equal(~hidden.isnan(), written), "shrink wrote outside the live segments' own ranks"

    output = torch.randn(tokens, group.out_total + 9).to(device, output_dtype)
    before = output.clone()
    ops.expand(hidden, packed.arena, packed.slot_table, output, where, index, group, longest, add)
    for part, slot in live:
        rows = hidden[:, part, : packed.ranks[slot]].double()
        old = before[part, : group.out_total].double() * add
        exact = old + torch.cat([h @ b.T for h, b in zip(rows, packed.b[slot], strict=True)], 1)
        size = old.abs() + torch.cat([h.abs() @ b.abs().T for h, b in zip(rows, packed.b[slot], strict=True)], 1)
        check(output[part, : group.out_total].contiguous(), exact, size, packed.ranks[slot])
        output[part, : group.out_total] = before[part, : group.out_total]
    assert torch.equal(output, before), "expand wrote outside the live segments"


@pytest.mark.parametrize("group", [QKV, GATE_UP, DOWN], ids=["qkv", "gate_up", "down"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_mixed_segments(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    dtype: torch.dtype,
    group: LoraGroup,
) -> None:
    """Starts past 0; empty, one-token and long segments; base rows between them; an adapter used twice."""
    packed = pack_adapters(group, (4, 16, 1), dtype)
    starts = [5, 5, 6, 20, 101, 109]
    check_both(ops, assert_rounded_once, packed, starts, [0, 1, -1, 0, 2], dtype, dtype)


@pytest.mark.parametrize("rank", [1, 4, 5, 8, 12, 16, 29, 33, 64, 128, 255, 256])
def test_every_rank(
    ops: SimpleNamespace, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any], rank: int
) -> None:
    packed = pack_adapters(QKV, (3, rank), BF16)
    check_both(ops, assert_rounded_once, packed, [0, 37, 40], [1, 0], BF16, FP16, add=rank % 2 == 0)


@pytest.mark.parametrize("output_dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("arena_dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("input_dtype", [FP16, BF16, FP32])
def test_dtypes_mix(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    input_dtype: torch.dtype,
    arena_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> None:
    packed = pack_adapters(LoraGroup(3, 40, (17,)), (5,), arena_dtype)
    check_both(
        ops, assert_rounded_once, packed, [1, 19], [0], input_dtype, output_dtype, False, index_dtype=torch.int64
    )


@pytest.mark.parametrize(
    ("starts", "indices"), [([4, 9, 11], [-1, -1]), ([2], []), ([0, 0, 0], [1, 0]), ([0, 64, 129], [1, 1])], ids=str
)
def test_edges(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    starts: list[int],
    indices: list[int],
) -> None:
    packed = pack_adapters(GATE_UP, (4, 9), FP32)
    check_both(ops, assert_rounded_once, packed, starts, indices, FP32, FP32, tail=0)


def test_wide_group(
    ops: SimpleNamespace, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any]
) -> None:
    packed = pack_adapters(LoraGroup(3, 1024, (1024, 256)), (8,), BF16)
    check_both(ops, assert_rounded_once, packed, [1, 18], [0], BF16, BF16)


@settings(
    max_examples=8 if torch.cuda.is_available() else 12,  # a GPU compiles nearly every draw anew
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_drawn_batches(
    ops: SimpleNamespace,
    assert_rounded_once: Callable[..., None],
    pack_adapters: Callable[..., Any],
    data: st.DataObject,
) -> None:
    small, floats = st.integers(1, 70), st.sampled_from([FP16, BF16, FP32])
    widths = tuple(data.draw(st.lists(small, min_size=1, max_size=4)))
    ranks = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    lengths = data.draw(st.lists(st.integers(0, 70), max_size=4))
    starts = [data.draw(st.integers(0, 5))]
    for length in lengths:
        starts.append(starts[-1] + length)
    indices = [data.draw(st.integers(-1, len(ranks) - 1)) for _ in lengths]
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    packed = pack_adapters(LoraGroup(data.draw(st.integers(0, 50)), data.draw(small), widths), ranks, data.draw(floats))
    check_both(
        ops,
        assert_rounded_once,
        packed,
        starts,
        indices,
        data.draw(floats),
        data.draw(floats),
        data.draw(st.booleans()),
        data.draw(st.sampled_from([torch.int32, torch.int64])),
    )


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_segment_is_the_same_bits_in_any_company(
    ops: SimpleNamespace, device: torch.device, pack_adapters: Callable[..., Any], dtype: torch.dtype
) -> None:
    group = GATE_UP
    packed = pack_adapters(group, (8, 5), dtype)
    lengths, slots = [3, 17, 1], [1, 0, 1]
    x = torch.randn(sum(lengths), group.in_features).to(device, dtype)

    def delta(tokens: torch.Tensor, starts: list[int], indices: list[int]) -> torch.Tensor:
        hidden = torch.zeros(group.slices, len(tokens), 8, device=device)
        out = torch.ones(len(tokens), group.out_total, dtype=dtype, device=device)
        where, index = torch.tensor(starts, device=device), torch.tensor(indices, device=device)
        ops.shrink(tokens, packed.arena, packed.slot_table, hidden, where, index, group, 17)
        ops.expand(hidden, packed.arena, packed.slot_table, out, where, index, group, 17)
        return out

    together = delta(x, [0, 3, 20, 21], slots)
    for part, slot in zip(torch.split(torch.arange(21), lengths), slots, strict=True):
        assert torch.equal(delta(x[part], [0, len(part)], [slot]), together[part])


@pytest.mark.parametrize("loose", [17, 10**6], ids=["even grid", "flat grid"])
def test_a_token_is_the_same_bits_however_its_prompt_is_cut(
    device: torch.device, pack_adapters: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, loose: int
) -> None:
    """Chunks of a prompt, other segments and base rows beside it, one launch or two: all sum in one order."""
    group, slots = LoraGroup(16, 1184, (40, 130)), 1
    packed = pack_adapters(group, (8, 5), BF16, offsets=(64, 64 + 8 * (16 + group.size)))
    x = torch.randn(21, group.in_features).to(device, BF16)

    def delta(first: int, cuts: list[int], indices: list[int], split_below: int) -> torch.Tensor:
        monkeypatch.setattr(sgmv, "SPLIT_BELOW", split_below)
        hidden = torch.full((group.slices, len(x), 16), torch.nan, device=device)
        out = torch.ones(len(x), group.out_total, dtype=BF16, device=device)
        where, index = torch.tensor(cuts, device=device), torch.tensor(indices, device=device)
        longest = max(*(b - a for a, b in pairwise(cuts)), loose)
        sgmv_shrink(x[first:], packed.arena, packed.slot_table, hidden[:, first:], where, index, group, longest)
        sgmv_expand(hidden[:, first:], packed.arena, packed.slot_table, out[first:], where, index, group, longest)
        return torch.cat([hidden[:, 3:20, :5].flatten(), out[3:20].flatten().float()])

    whole = delta(3, [0, 17], [slots], 0)
    assert not whole.isnan().any()
    assert torch.equal(delta(3, [0, 17], [slots], 10**6), whole), "chunks side by side"
    assert torch.equal(delta(0, [0, 3, 20, 21], [0, slots, -1], 0), whole), "in company"
    cut = delta(0, [3, 3, 4, 15, 20], [0, *[slots] * 3], 10**6)
    if device.type == "cuda":
        assert torch.equal(cut, whole), "cut in three"
    else:  # a product of NumPy or MKL sums a row in an order that depends on where in the matrix it lies
        torch.testing.assert_close(cut, whole, rtol=2**-7, atol=1e-3)


def test_many_ragged_segments(
    ops: SimpleNamespace, assert_rounded_once: Callable[..., None], pack_adapters: Callable[..., Any]
) -> None:
    """More segments than one look at their starts takes in, one of them much longer than the others."""
    packed = pack_adapters(LoraGroup(3, 20, (17, 5)), (4, 7, 1), BF16)
    lengths = [index % 3 for index in range(150)] + [131] + [index % 2 for index in range(20)]
    starts = [9, *(9 + total for total in accumulate(lengths))]
    check_both(ops, assert_rounded_once, packed, starts, [index % 4 - 1 for index in range(171)], BF16, BF16)


@pytest.mark.gpu
def test_overlapped_launches_keep_the_streams_order(
    device: torch.device, pack_adapters: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches without a live segment, between a slow writer and a reader, let neither pass the other."""
    packed = pack_adapters(LoraGroup(8, 4096, (4096,)), (16, 16), BF16)
    state, group = (packed.arena, packed.slot_table), packed.group
    where = torch.tensor([0, 100, 300, 512], dtype=torch.int32, device=device)
    live = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    none = torch.full_like(live, -1)
    x, source = torch.randn(512, 4096).to(device, BF16), torch.randn(512, 4096).to(device, BF16)
    large = torch.randn(6144, 6144, device=device, dtype=BF16)

    def run(overlap: bool) -> torch.Tensor:
        hidden = torch.zeros(1, 512, 16, device=device)
        out = torch.zeros(512, 4096, device=device, dtype=BF16)
        for turn in range(20):
            # A launch whose chunks lie side by side is two.
            monkeypatch.setattr(sgmv, "SPLIT_BELOW", (turn % 2) * 10**6)
            large @ large  # the queue fills behind it, so that launches follow each other at once
            torch.add(source, float(turn), out=x)
            sgmv_expand(hidden, *state, out, where, none, group, 212, operands_ready=overlap)
            sgmv_shrink(x, *state, hidden, where, none, group, 212, operands_ready=overlap)
            sgmv_shrink(x, *state, hidden, where, live, group, 212, operands_ready=overlap)
            sgmv_expand(hidden, *state, out, where, none, group, 212, operands_ready=overlap)
            sgmv_expand(hidden, *state, out, where, live, group, 212, operands_ready=overlap)
        return out

    expected = run(overlap=False)
    for _ in range(5):
        assert torch.equal(run(overlap=True), expected)


@pytest.mark.parametrize("rank", [5, 16, 256])
@pytest.mark.parametrize(
    ("arena_dtype", "output_dtype", "size"), [(BF16, BF16, 1.0), (BF16, FP16, 1.0), (FP16, FP16, 2.0**22)], ids=str
)
def test_expand_is_as_good_as_fp32_rounded_once(
    ops: SimpleNamespace,
    device: torch.device,
    pack_adapters: Callable[..., Any],
    arena_dtype: torch.dtype,
    output_dtype: torch.dtype,
    size: float,
    rank: int,
) -> None:
    """Relative error over the whole output; ``size`` takes fp32 activations past fp16's range and B to its low end."""
    group = LoraGroup(0, 8, (200,))
    packed = pack_adapters(group, (rank,), arena_dtype)
    offset, rank = packed.slot_table[0].tolist()
    b = packed.arena[offset + 8 * rank :][: 200 * rank].view(200, rank)
    b /= size
    hidden = torch.randn(1, 70, rank, device=device) * 2.0 ** torch.randint(-6, 3, (1, 70, rank), device=device) * size
    output = torch.zeros(70, 200, dtype=output_dtype, device=device)
    starts, index = torch.tensor([0, 70], device=device), torch.tensor([0], device=device)
    ops.expand(hidden, packed.arena, packed.slot_table, output, starts, index, group, 70)
    exact = hidden[0].double() @ b.double().T
    error = (output.double() - exact).norm()
    once = (exact.float().to(output_dtype).double() - exact).norm()
    truncates = device.type == "cpu" and interpreter_on() and output_dtype == BF16
    assert error <= 1.2 * once * (2 if truncates else 1)


def _operands(pack_adapters: Callable[..., Any]) -> dict[str, Any]:
    packed = pack_adapters(GATE_UP, (4, 8), FP32)
    device = packed.arena.device
    return {
        "inputs": torch.randn(2, 6, 8, device=device),
        "arena": packed.arena.nan_to_num(),
        "slot_table": packed.slot_table,
        "output": torch.zeros(6, GATE_UP.out_total, device=device),
        "segment_starts": torch.tensor([1, 3, 6], dtype=torch.int32, device=device),
        "lora_indices": torch.tensor([1, 0], device=device),
        "group": GATE_UP,
        "max_segment": 3,
    }


def test_operators_are_registered(pack_adapters: Callable[..., Any]) -> None:
    given_ = _operands(pack_adapters)
    del given_["group"], given_["max_segment"]
    tail = (GATE_UP.unit, GATE_UP.in_features, list(GATE_UP.out_features), 3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lorafleet.sgmv_expand.default, (*given_.values(), *tail, True), test_utils=tests)
    given_["inputs"] = torch.randn(6, GATE_UP.in_features, device=given_["arena"].device)
    given_["output"] = torch.zeros(2, 6, 8, device=given_["arena"].device)
    torch.library.opcheck(torch.ops.lorafleet.sgmv_shrink.default, (*given_.values(), *tail), test_utils=tests)


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "starts": ("segment_starts", lambda t: t[:2], "2 segment_starts for 2 lora_indices"),
    "float starts": ("segment_starts", lambda t: t.float(), r"segment_starts has dtype torch\.float32"),
    "tokens": ("output", lambda t: t[:5], r"output has shape \(5, 170\); 6 tokens"),
    "width": ("output", lambda t: t[:, :99], r"output has shape \(6, 99\)"),
    "slices": ("inputs", lambda t: t[:1], "inputs hold 1 slices"),
    "max_segment": ("max_segment", lambda _: -1, "max_segment is -1"),
}
REFUSED_ON_CPU: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "short bound": ("max_segment", lambda _: 2, "a segment has 3 tokens but max_segment is 2"),
    "falling": ("segment_starts", lambda t: t.flip(0), r"segment_starts \[6, 3, 1\] must not decrease"),
    "past the end": ("segment_starts", lambda t: t + 1, r"\[2, 4, 7\] .* 6 tokens"),
    "slot": ("lora_indices", lambda t: t + 2, "row 0 has adapter index 3"),
    "unpadded": ("slot_table", lambda t: t - 1, "slot 0 has offset 7 and rank 7; pack adapters at multiples of 8"),
}


@pytest.mark.parametrize("name", REFUSED | REFUSED_ON_CPU)
def test_refusals_name_the_value(pack_adapters: Callable[..., Any], name: str) -> None:
    key, change, message = (REFUSED | REFUSED_ON_CPU)[name]
    arguments = _operands(pack_adapters)
    if name in REFUSED_ON_CPU:
        arguments = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sgmv_expand(**arguments | {key: change(arguments[key])})


def test_shrink_refusals(pack_adapters: Callable[..., Any]) -> None:
    arguments = _operands(pack_adapters)
    arguments["inputs"] = torch.randn(6, GATE_UP.in_features, device=arguments["arena"].device)
    arguments["output"] = torch.zeros(2, 6, 8, device=arguments["arena"].device)
    sgmv_shrink(**arguments)
    with pytest.raises(ValueError, match="inputs are 9 wide but the group takes 33"):
        sgmv_shrink(**arguments | {"inputs": arguments["inputs"][:, :9]})
    with pytest.raises(ValueError, match=r"output has shape \(2, 5, 8\); 2 slices and 6 tokens"):
        sgmv_shrink(**arguments | {"output": arguments["output"][:, :5]})

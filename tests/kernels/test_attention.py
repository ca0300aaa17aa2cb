"""Paged attention, the Triton kernels and their torch twins, against float64.

Every cache is NaN wherever no query may look: unused pages, page tails, positions behind a sliding window; and
unused page-table entries point outside the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention, reference_attention
from kernels.attention import default_splits
from kernels.dispatch import interpreter_on

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NOWHERE = 2**31 - 1
GUARD = 7.0

# Largest |got - exact| per unit of |exact| + sum of |weight * value|. fp32: the softmax amplifies the rounding of
# scores. 16 bits: the weights and the result are each rounded once, by half a unit in the last place; Triton's
# interpreter truncates to bf16, a whole unit.
TOLERANCE = {FP32: 4e-6, FP16: 2**-11 + 4e-6, BF16: 2**-8 + 4e-6}
INTERPRETED_BF16 = 2**-7 + 4e-6


@pytest.fixture(params=["kernel", "twin"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return attention if request.param == "kernel" else reference_attention


@dataclass(frozen=True)
class Shape:
    """What one case of either function fixes beside its rows."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16
    dtype: torch.dtype = FP32
    window: int = 0


@dataclass
class Cache:
    """Rows of random keys and values, scattered over pages in random order."""

    keys: Tensor
    values: Tensor
    page_table: Tensor
    context_lens: Tensor
    dense_keys: list[Tensor]  # per row (context, kv_heads, head_dim) float64
    dense_values: list[Tensor]

    @classmethod
    def make(cls, device: torch.device, lens: Sequence[int], shape: Shape, first_seen: Sequence[int] = ()) -> Cache:
        """Positions before a row's ``first_seen`` are left out, as if their pages had been freed."""
        page_size, dtype = shape.page_size, shape.dtype
        counts = [-(-n // page_size) for n in lens]
        pages = sum(counts) + 2
        # Keys and values of a page lie side by side, so the caches are views with a wide page stride.
        both = torch.full((pages, 2, page_size, shape.kv_heads, shape.head_dim), torch.nan, dtype=dtype)
        order = (torch.randperm(pages - 2) + 1).tolist()
        table = torch.full((len(lens), max(counts, default=0) + 1), NOWHERE, dtype=torch.int32)
        dense: list[Tensor] = []
        seen = first_seen or [0] * len(lens)
        for row, length in enumerate(lens):
            content = torch.randn(length, 2, shape.kv_heads, shape.head_dim).to(dtype)
            for position in range(seen[row], length):
                page = order[sum(counts[:row]) + position // page_size]
                table[row, position // page_size] = page
                both[page, :, position % page_size] = content[position]
            dense.append(content.double().to(device))
        both = both.to(device)
        return cls(
            both[:, 0],
            both[:, 1],
            table.to(device),
            torch.tensor(lens, dtype=torch.int32, device=device),
            [content[:, 0] for content in dense],
            [content[:, 1] for content in dense],
        )


def packed_queries(device: torch.device, tokens: int, shape: Shape) -> Tensor:
    """Queries as the model holds them: a strided view into packed q|k|v rows, NaN beside them."""
    heads, head_dim = shape.heads, shape.head_dim
    width = (heads + 2 * shape.kv_heads) * head_dim
    qkv = torch.full((tokens, width), torch.nan, dtype=shape.dtype, device=device)
    qkv[:, : heads * head_dim] = torch.randn(tokens, heads * head_dim).to(device)
    return qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))


def guarded_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """(output like q inside guard columns, the memory around it)."""
    memory = torch.full((q.shape[0], q.shape[1] + 2, q.shape[2]), GUARD, dtype=q.dtype, device=q.device)
    return memory[:, 1:-1], memory


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, position: int, window: int):
    """One query (heads, head_dim) at ``position``: the float64 result and the sum of |weight * value|."""
    low = max(0, position - window + 1) if window else 0
    group = q.shape[0] // keys.shape[1]
    result, magnitude = [], []
    for head in range(q.shape[0]):
        k, v = keys[low : position + 1, head // group], values[low : position + 1, head // group]
        weights = torch.softmax(k @ q[head].double() * scale, 0)
        result.append(weights @ v)
        magnitude.append(weights @ v.abs())
    return torch.stack(result), torch.stack(magnitude)


def assert_close(got: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    limit = TOLERANCE[got.dtype]
    if got.dtype == BF16 and got.device.type == "cpu" and interpreter_on():
        limit = INTERPRETED_BF16
    error = (got.double() - exact).abs() / (exact.abs() + magnitude)
    assert not error.isnan().any()
    assert error.max().item() <= limit


def check_decode(
    module: ModuleType, device: torch.device, lens: Sequence[int], shape: Shape, splits: int | None
) -> None:
    window = shape.window
    first_seen = [max(0, n - window) if window else 0 for n in lens]
    cache = Cache.make(device, lens, shape, first_seen)
    q = packed_queries(device, len(lens), shape)
    q[[row for row, length in enumerate(lens) if length == 0]] = torch.nan
    out, memory = guarded_output(q)
    scale = shape.head_dim**-0.5
    module.paged_decode(q, cache.keys, cache.values, cache.page_table, cache.context_lens, out, scale, window, splits)
    for row, length in enumerate(lens):
        if length == 0:
            assert (out[row] == 0).all()
            continue
        k, v = cache.dense_keys[row], cache.dense_values[row]
        assert_close(out[row], *exact_attention(q[row], k, v, scale, length - 1, window))
    assert (memory[:, [0, -1]] == GUARD).all()


def check_prefill(
    module: ModuleType, device: torch.device, prefixes: Sequence[int], chunks: Sequence[int], shape: Shape
) -> None:
    window = shape.window
    lens = [prefix + chunk for prefix, chunk in zip(prefixes, chunks, strict=True)]
    first_seen = [max(0, prefix - window + 1) if window else 0 for prefix in prefixes]
    cache = Cache.make(device, lens, shape, first_seen)
    starts = list(accumulate(chunks, initial=2))  # two tokens of no row before, three after
    q = packed_queries(device, starts[-1] + 3, shape)
    q[:2] = q[-3:] = torch.nan
    out, memory = guarded_output(q)
    scale = shape.head_dim**-0.5
    module.paged_prefill(
        q,
        cache.keys,
        cache.values,
        cache.page_table,
        torch.tensor(starts, dtype=torch.int32, device=device),
        cache.context_lens,
        out,
        scale,
        max(chunks),
        window,
    )
    for row, (prefix, chunk) in enumerate(zip(prefixes, chunks, strict=True)):
        for index in {0, 1, chunk // 2, chunk - 2, chunk - 1} & set(range(chunk)):
            token = starts[row] + index
            k, v = cache.dense_keys[row], cache.dense_values[row]
            assert_close(out[token], *exact_attention(q[token], k, v, scale, prefix + index, window))
    assert not out.isnan().any()
    for guard in (memory[:2], memory[-3:], memory[:, [0, -1]]):
        assert (guard == GUARD).all()


SHAPES = [
    pytest.param(Shape(2, 2, 32), id="group1"),
    pytest.param(Shape(6, 2, 64, 32, BF16), id="group3"),
    pytest.param(Shape(4, 1, 128, 16, BF16), id="group4"),
    pytest.param(Shape(14, 2, 64, 16, FP16, window=20), id="group7-window"),
    pytest.param(Shape(8, 1, 80), id="group8-dim80"),
    pytest.param(Shape(7, 1, 80, 32, BF16, window=33), id="group7-dim80-window"),
    pytest.param(Shape(3, 1, 128, window=1), id="group3-window1"),
    pytest.param(Shape(20, 1, 16, 16, FP16), id="group20-dim16"),
]


@pytest.mark.parametrize("splits", [1, 4, 16, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(module: ModuleType, device: torch.device, shape: Shape, splits: int | None) -> None:
    check_decode(module, device, [18, 0, 1, 101], shape, splits)


@pytest.mark.parametrize("splits", [3, None])
def test_decode_over_many_splits(module: ModuleType, device: torch.device, splits: int | None) -> None:
    """Lengths at the edges of the default pieces of 256 keys, and a number of splits that is no power of two."""
    check_decode(module, device, [256, 257, 0, 600], Shape(4, 2, 32), splits)
    check_decode(module, device, [700, 290, 40], Shape(2, 1, 32, window=300), splits)


def test_decode_of_256_dimensions(module: ModuleType, device: torch.device) -> None:
    check_decode(module, device, [40, 3], Shape(2, 1, 256, 16, BF16), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(module: ModuleType, device: torch.device, shape: Shape) -> None:
    check_prefill(module, device, [0, 1, 17, 100, 5], [70, 1, 33, 12, 0], shape)


def test_prefill_of_256_dimensions(module: ModuleType, device: torch.device) -> None:
    check_prefill(module, device, [9, 0], [2, 34], Shape(2, 1, 256, 16, BF16))


def test_prefill_of_a_long_chunk(device: torch.device) -> None:
    """More queries than the twin's block, so that a window also cuts keys between its blocks."""
    check_prefill(reference_attention, device, [300], [600], Shape(2, 1, 16, window=120))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kv_heads = draw(st.integers(1, 2))
    return Shape(
        kv_heads * draw(st.integers(1, 8)),
        kv_heads,
        draw(st.sampled_from([32, 64, 80])),
        draw(st.sampled_from([16, 32])),
        draw(st.sampled_from([FP32, BF16, FP16])),
        draw(st.sampled_from([0, 25])),
    )


CHUNKS = st.lists(st.tuples(st.integers(0, 110), st.integers(1, 70)), min_size=1, max_size=3)
DRAWN = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@DRAWN
@given(
    lens=st.lists(st.integers(0, 140), min_size=1, max_size=4), splits=st.sampled_from([None, 2, 16]), shape=shapes()
)
def test_decode_drawn(
    module: ModuleType, device: torch.device, lens: list[int], splits: int | None, shape: Shape
) -> None:
    check_decode(module, device, lens, shape, splits)


@DRAWN
@given(rows=CHUNKS, shape=shapes())
def test_prefill_drawn(module: ModuleType, device: torch.device, rows: list[tuple[int, int]], shape: Shape) -> None:
    prefixes, chunks = zip(*rows, strict=True)
    check_prefill(module, device, prefixes, chunks, shape)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_decode_row_does_not_depend_on_the_batch(module: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    """Bit for bit: alone, in other places of other batches, and under page tables of other widths."""
    lens, shape = [300, 5, 0, 77, 530], Shape(6, 2, 64, dtype=dtype)
    cache = Cache.make(device, lens, shape)
    q = packed_queries(device, len(lens), shape)

    def decode(rows: list[int], width: int) -> Tensor:
        table = torch.full((len(rows), width), NOWHERE, dtype=torch.int32, device=device)
        kept = cache.page_table[rows, :width]
        table[:, : kept.shape[1]] = kept
        out = torch.empty(len(rows), 6, 64, dtype=dtype, device=device)
        module.paged_decode(q[rows], cache.keys, cache.values, table, cache.context_lens[rows], out, 0.125)
        return out

    together = decode([0, 1, 2, 3, 4], 34)
    assert torch.equal(decode([4, 3, 0, 0], 300), together[[4, 3, 0, 0]])
    for row, pages in enumerate((19, 1, 1, 5, 34)):
        assert torch.equal(decode([row], pages)[0], together[row])


@pytest.mark.parametrize("window", [0, 40])
def test_prefill_row_does_not_depend_on_the_batch(module: ModuleType, device: torch.device, window: int) -> None:
    """Bit for bit: alone, and elsewhere in other batches whose tokens begin elsewhere."""
    prefixes, chunks, shape = [3, 90, 0, 17], [70, 1, 130, 33], Shape(6, 2, 64, dtype=FP16)
    cache = Cache.make(device, [p + c for p, c in zip(prefixes, chunks, strict=True)], shape)
    queries = [torch.randn(chunk, 6, 64, device=device).half() for chunk in chunks]

    def prefill(rows: list[int], first: int) -> list[Tensor]:
        q = torch.cat([torch.zeros(first, 6, 64, dtype=FP16, device=device), *(queries[row] for row in rows)])
        starts = list(accumulate((chunks[row] for row in rows), initial=first))
        out = torch.empty_like(q)
        module.paged_prefill(
            q,
            cache.keys,
            cache.values,
            cache.page_table[rows],
            torch.tensor(starts, dtype=torch.int32, device=device),
            cache.context_lens[rows],
            out,
            0.125,
            max(chunks[row] for row in rows),
            window,
        )
        return [out[begin:end] for begin, end in pairwise(starts)]

    together = prefill([0, 1, 2, 3], 0)
    for rows, first in (([2, 0, 0], 5), ([3], 0), ([1, 3], 1)):
        for row, result in zip(rows, prefill(rows, first), strict=True):
            assert torch.equal(result, together[row])


def test_default_splits_are_a_matter_of_capacity() -> None:
    assert [default_splits(pages, 16) for pages in (0, 1, 16, 17, 100, 256, 100_000)] == [1, 1, 1, 2, 7, 16, 32]


@pytest.mark.parametrize("window", [0, 30])
def test_prefill_does_not_depend_on_chunking(module: ModuleType, device: torch.device, window: int) -> None:
    """A prompt in one piece and in pieces down to one token, to fp32 rounding; the last token also by decode."""
    length, shape, scale = 90, Shape(6, 2, 32), 32**-0.5
    cache = Cache.make(device, [length], shape)
    q = packed_queries(device, length, shape)

    def prefill(pieces: Sequence[int]) -> Tensor:
        out = torch.empty(length, 6, 32, device=device)
        end = 0
        for piece in pieces:
            begin, end = end, end + piece
            starts = torch.tensor([begin, end], dtype=torch.int32, device=device)
            context = torch.tensor([end], dtype=torch.int32, device=device)
            module.paged_prefill(
                q, cache.keys, cache.values, cache.page_table, starts, context, out, scale, piece, window
            )
        assert end == length
        return out

    whole = prefill([length])
    for pieces in ([1, 13, 40, 36], [64, 26], [85, 1, 1, 1, 1, 1]):
        assert (prefill(pieces) - whole).abs().max() <= 2e-6
    last = torch.empty(1, 6, 32, device=device)
    module.paged_decode(q[-1:], cache.keys, cache.values, cache.page_table, cache.context_lens, last, scale, window)
    assert (last[0] - whole[-1]).abs().max() <= 2e-6


def test_empty_batches(module: ModuleType, device: torch.device) -> None:
    cache = Cache.make(device, [], Shape(2, 1, 32))
    q = torch.empty(0, 2, 32, device=device)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    caches = (cache.keys, cache.values, cache.page_table)
    module.paged_decode(q, *caches, cache.context_lens, torch.empty_like(q), 1.0)
    module.paged_prefill(q, *caches, starts, cache.context_lens, torch.empty_like(q), 1.0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 32)}, "3 query heads cannot share 2 key heads"),
        ({"q": torch.zeros(2, 4, 16), "out": torch.zeros(2, 4, 16)}, "head_dim, 16"),
        ({"q": torch.zeros(2, 4, 32, dtype=BF16)}, "must be one dtype"),
        ({"q": torch.zeros(2, 32, 4).transpose(1, 2)}, "q has stride 4"),
        ({"out": torch.zeros(2, 2, 32)}, r"out \(2, 2, 32\)"),
        ({"page_table": torch.zeros(3, 2, dtype=torch.int32)}, "page_table has 3 rows but context_lens 2"),
        ({"value_cache": torch.zeros(4, 16, 1, 32)}, r"value_cache \(4, 16, 1, 32\)"),
        ({"value_cache": torch.zeros(4, 2, 16, 32).transpose(1, 2)}, r"value_cache \(1024, 32, 512, 1\)"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"num_splits": 0}, "num_splits is 0"),
        ({"q": torch.zeros(3, 4, 32), "out": torch.zeros(3, 4, 32)}, "q has 3 rows but context_lens 2"),
    ],
)
def test_decode_refuses_what_does_not_fit(change: dict[str, Tensor | int], message: str) -> None:
    arguments: dict[str, Tensor | int | float] = {
        "q": torch.zeros(2, 4, 32),
        "key_cache": torch.zeros(4, 16, 2, 32),
        "value_cache": torch.zeros(4, 16, 2, 32),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "context_lens": torch.ones(2, dtype=torch.int32),
        "out": torch.zeros(2, 4, 32),
        "scale": 1.0,
    }
    call: Callable[..., None] = attention.paged_decode
    with pytest.raises(ValueError, match=message):
        call(**(arguments | change))


def test_prefill_refuses_query_starts_of_another_batch() -> None:
    q = torch.zeros(2, 4, 32)
    cache = torch.zeros(4, 16, 2, 32)
    table, lens = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="query_starts has 2 entries but must have rows"):
        attention.paged_prefill(q, cache, cache, table, lens, lens, torch.zeros_like(q), 1.0, 1)


@pytest.mark.gpu
def test_decode_in_a_cuda_graph(device: torch.device) -> None:
    """Lengths, pages and queries change between replays; the graph reads them on the device.

    Its scratch is its own: what others allocate after the capture stays as it is.
    """
    shape = Shape(8, 2, 64, dtype=BF16)
    cache = Cache.make(device, [400, 33, 90], shape)
    q = packed_queries(device, 3, shape).contiguous()
    out = torch.empty_like(q)
    lens, table = torch.zeros_like(cache.context_lens), torch.zeros_like(cache.page_table)

    def decode() -> None:
        attention.paged_decode(q, cache.keys, cache.values, table, lens, out, 0.125)

    decode()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    others = [torch.full((1 << size,), GUARD, device=device) for size in range(5, 21)]
    for order in ([0, 1, 2], [2, 0, 1]):
        lens.copy_(cache.context_lens[order])
        table.copy_(cache.page_table[order])
        q.normal_()
        graph.replay()
        for place, row in enumerate(order):
            k, v = cache.dense_keys[row], cache.dense_values[row]
            assert_close(out[place], *exact_attention(q[place], k, v, 0.125, len(k) - 1, 0))
    assert all((other == GUARD).all() for other in others)


@pytest.mark.gpu
def test_caches_beyond_two_to_the_31_elements(device: torch.device) -> None:
    pages = 2**31 // (16 * 8 * 128) + 4
    keys, values = torch.zeros(2, pages, 16, 8, 128, dtype=BF16, device=device)
    keys[-2:], values[-2:] = torch.randn(2, 2, 16, 8, 128, device=device).to(BF16)
    table = torch.tensor([[pages - 1, pages - 2]], dtype=torch.int32, device=device)
    lens = torch.tensor([30], dtype=torch.int32, device=device)
    q = torch.randn(2, 8, 128, device=device).to(BF16)
    out, starts = torch.empty_like(q), torch.tensor([0, 2], dtype=torch.int32, device=device)
    k, v = (torch.cat((cache[-1], cache[-2])).double() for cache in (keys, values))
    attention.paged_prefill(q, keys, values, table, starts, lens, out, 0.1, 2)
    for index in range(2):
        assert_close(out[index], *exact_attention(q[index], k, v, 0.1, 28 + index, 0))
    attention.paged_decode(q[1:], keys, values, table, lens, out[1:], 0.1)
    assert_close(out[1], *exact_attention(q[1], k, v, 0.1, 29, 0))

"""The sampling kernels: what they keep against sorting in float64, and what they draw against the torch twin.

Vocabularies are mostly odd, so that on a GPU few variants are compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_sampling
from kernels.dispatch import interpreter_on, jit, launchable, tl
from kernels.sampling import _Draw, gumbel_noise, sample, sample_with_logprob
from kernels.sampling_kernels import quick_noise
from kernels.sampling_row import DRAWN, LAST, LOWEST
from tests.kernels.sampling_rows import columns

needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and not interpreter_on(), reason="the Triton kernels run neither here nor interpreted"
)
MASS_ERROR = 1e-5  # promised: how closely the mass before a token is known


def kept_by_kernels(logits: Tensor, parameters: list[Tensor], **options: int) -> list[set[int] | None]:
    """Each row's kept tokens; None for a row that takes the likeliest."""
    launches = _Draw(logits, *parameters)
    launches.mark()
    launches.scan()
    launches.cut(**options)
    # The order of fp32 numbers as integers, -0 being 0.
    bits = torch.where(logits == 0, 0.0, logits.float()).view(torch.int32)
    images = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    lowest, last = launches.ints[:, int(LOWEST), None], launches.ints[:, int(LAST), None]
    kept = (images > lowest) | ((images == lowest) & (ids <= last))
    drawn = launches.ints[:, int(DRAWN)].tolist()
    return [set(row.nonzero().flatten().tolist()) if one else None for row, one in zip(kept, drawn, strict=True)]


def kept_exactly(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """One row, in float64: sorted, counted and cut."""
    values = logits.double()
    largest = values.max()
    order = values.sort(descending=True, stable=True).indices
    order = order[values[order] > -math.inf]
    if top_k > 0:
        order = order[:top_k]
    scaled = (values[order] - largest) / temperature
    if top_p < 1:
        mass = scaled.exp()
        before = mass.cumsum(0) - mass
        order = order[: max(1, int((before < top_p * mass.sum()).sum()))]
        scaled = scaled[: len(order)]
    if min_p > 0:
        order = order[scaled >= math.log(min_p)]
    return set(order.tolist())


def assert_kept(logits: Tensor, parameters: list[Tensor], **options: int) -> None:
    """Exact in top-k and min-p; in top-p up to tokens whose mass before them is within MASS_ERROR of p."""
    for row, kept in enumerate(kept_by_kernels(logits, parameters, **options)):
        temperature, top_k, top_p, min_p = (values[row].item() for values in parameters[:4])
        if temperature <= 0 or top_k == 1:
            assert kept is None
            continue
        assert kept is not None
        few, many = (
            kept_exactly(logits[row], temperature, int(top_k), top_p * factor if top_p < 1 else 1.0, min_p)
            for factor in (1 - MASS_ERROR, min(1 + MASS_ERROR, (1 - 1e-12) / top_p))
        )
        assert few <= kept <= many, (row, len(few), len(kept), len(many))
        if top_p == 1:
            assert kept == many


@needs_kernels
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernels_keep_what_sorting_keeps(device: torch.device, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 3, 5, 63, 255, 1001, 4095, 4097][device.type == "cuda" :]), label="vocab")
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="numbers"))
    logits = torch.randn(2, vocab, generator=numbers) * data.draw(st.sampled_from([0.1, 1.0, 4.0, 1e4]), label="spread")
    logits += data.draw(st.sampled_from([0.0, 30.0, -1e3]), label="offset")
    shape = data.draw(st.sampled_from(["smooth", "bf16", "whole", "equal", "barred"]), label="shape")
    if shape == "bf16":
        logits = logits.bfloat16()
    elif shape == "whole":
        logits = logits.round()
    elif shape == "equal":
        logits = torch.where(torch.rand(2, vocab, generator=numbers) < 0.9, logits[:, :1], logits)
    elif shape == "barred":
        logits[:, 1:].masked_fill_(torch.rand(2, vocab - 1, generator=numbers) < 0.97, -math.inf)
    parameters = columns(
        2,
        device,
        temperature=data.draw(st.sampled_from([0.01, 0.6, 1.0, 3.0]), label="temperature"),
        top_k=data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 50, 900, 5000]), min_size=2, max_size=2), label="top_k"),
        top_p=data.draw(
            st.lists(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]), min_size=2, max_size=2), label="top_p"
        ),
        min_p=data.draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]), label="min_p"),
    )
    assert_kept(logits.to(device), parameters)


FILTERS: dict[str, Any] = {
    "temperature": [1.0, 0.7, 1.0, 1.3, 0.8, 2.0],
    "top_k": [50, 0, 3000, 700, 2, 0],
    "top_p": [1.0, 0.9, 1.0, 0.8, 0.5, 0.9999],
    "min_p": [0.0, 0.0, 0.001, 0.02, 0.0, 0.3],
    "seed": [3, -9, 2**40, 7, 7, 11],
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_keep_what_sorting_keeps_over_several_chunks(device: torch.device, dtype: torch.dtype) -> None:
    """bf16 logits hold many equals; a bin that cannot be copied is searched where it lies, with the same result."""
    logits = (torch.randn(6, 9001, device=device) * 3).to(dtype)
    parameters = columns(6, device, **FILTERS)
    assert_kept(logits, parameters)
    assert kept_by_kernels(logits, parameters, capacity=64) == kept_by_kernels(logits, parameters)


@needs_kernels
def test_equals_are_kept_by_id_across_chunks(device: torch.device) -> None:
    logits = torch.zeros(4, 9001, device=device)
    logits[1, 100:8000] = 1.0
    logits[2] = -0.0
    logits[2, ::2] = 0.0
    parameters = columns(4, device, top_k=[5000, 4500, 8200, 0], top_p=[1.0, 1.0, 1.0, 0.5])
    kept = kept_by_kernels(logits, parameters)
    assert kept == [set(range(5000)), set(range(100, 4600)), set(range(8200)), set(range(4501))]


def assert_like_the_twin(logits: Tensor, parameters: list[Tensor]) -> None:
    """The same tokens and, to fp32 rounding, the same log probabilities."""
    tokens, logprobs = sample_with_logprob(logits, *parameters)
    expected, _ = reference_sampling.sample_with_logprob(logits, *parameters)
    assert torch.equal(tokens, expected)
    exact = torch.log_softmax(logits.double(), -1).gather(1, expected[:, None])[:, 0]
    assert (logprobs.double() - exact).abs().max() <= 2e-6 * (1 + exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_equal_the_twins(device: torch.device, dtype: torch.dtype) -> None:
    logits = (torch.randn(6, 9001, device=device) * 2).to(dtype)
    assert_like_the_twin(logits, columns(6, device, **FILTERS))
    assert_like_the_twin(logits, columns(6, device, temperature=[0.0, 1.0, 0.3, 5.0, 1.0, 1.0], top_k=[0] * 5 + [1]))


def test_tokens_equal_the_twins_with_the_engines_types(device: torch.device) -> None:
    logits = torch.randn(6, 1001, device=device) * 2
    types = [torch.float64, torch.int64, torch.float64, torch.float64, torch.int64, torch.int64]
    given = columns(6, torch.device("cpu"), **FILTERS)
    assert_like_the_twin(logits, [values.to(dtype) for values, dtype in zip(given, types, strict=True)])


@jit
def quick_noise_kernel(words, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, quick_noise(tl.load(words + place).to(tl.uint32)))


@needs_kernels
def test_fp32_noise_is_as_good_as_the_margin_demands(device: torch.device) -> None:
    """Small words, where noise is largest; where the series ends; evenly over all; and the largest."""
    starts = [0, 2**28 - 4096, 2**32 - 4096]
    words = torch.cat([torch.arange(start, start + 8192) % 2**32 for start in starts])
    words = torch.cat([words, torch.arange(8192) * 2**19 + 12345]).to(device)
    noise = torch.empty(words.shape, dtype=torch.float32, device=device)
    launchable(quick_noise_kernel, noise)[(8,)](words, noise, BLOCK=4096)
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    assert (noise.double() - exact).abs().max() < 2e-5


def test_scores_that_fp32_cannot_tell_apart(device: torch.device) -> None:
    """Every logit is what its noise lacks to one score: the last bits of float64 decide, in chunks and over them."""
    parameters = columns(4, device, seed=[1, 2, 3, 4])
    noise = gumbel_noise(parameters[4], parameters[5], 9001)
    logits = (5.0 - noise).float()
    assert (logits.double() + noise - 5.0).abs().max() < 2e-6
    assert_like_the_twin(logits, parameters)


@needs_kernels
def test_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    """Bit for bit: alone, in another order, and as a view into wider rows whose other columns are NaN."""
    wide = torch.full((6, 4401), math.nan, device=device)
    wide[:, :4225] = torch.randn(6, 4225, device=device) * 3
    logits = wide[:, :4225]
    parameters = columns(6, device, **FILTERS, position=list(range(6)))
    tokens, logprobs = sample_with_logprob(logits, *parameters)
    for picked in ([3], [5, 0], [4, 3, 2, 1, 1]):
        part = sample_with_logprob(logits[picked], *(values[picked] for values in parameters))
        assert torch.equal(part[0], tokens[picked])
        assert torch.equal(part[1], logprobs[picked])
    alone = sample_with_logprob(logits[2:3], *(values[2:3] for values in parameters))
    assert torch.equal(alone[0], tokens[2:3])
    assert torch.equal(alone[1], logprobs[2:3])


def test_rows_of_no_use_have_no_probability(device: torch.device) -> None:
    logits = torch.randn(8, 701, device=device)
    logits[0, 650] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3:6] = logits[0:3]
    expected = sample_with_logprob(logits[6:], *columns(2, device, top_k=5, top_p=0.9, position=[6, 7]))
    for temperature in ([0.0] * 6 + [1.0] * 2, [1.0] * 8):
        tokens, logprobs = sample_with_logprob(
            logits, *columns(8, device, temperature=temperature, top_k=[0, 0, 0] + [5] * 5, top_p=[1.0] * 3 + [0.9] * 5)
        )
        assert logprobs.isnan().tolist() == [True] * 6 + [False] * 2
        assert ((tokens >= 0) & (tokens < 701)).all()
        assert torch.equal(tokens[6:], expected[0])
        assert torch.equal(logprobs[6:], expected[1])


def test_no_rows(device: torch.device) -> None:
    tokens, logprobs = sample_with_logprob(torch.empty(0, 50, device=device), *columns(0, device))
    assert tokens.shape == logprobs.shape == (0,)


def test_a_row_that_is_not_contiguous_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"logits have strides \(1, 4\)"):
        sample(torch.zeros(8, 4, device=device).T, *columns(4, device))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits(device: torch.device) -> None:
    logits = torch.randn(6, 128_256, device=device) * 3
    parameters = columns(6, device, **FILTERS)
    tokens, logprobs = sample_with_logprob(logits, *parameters)
    for _ in range(100):
        again = sample_with_logprob(logits, *parameters)
        assert torch.equal(again[0], tokens)
        assert torch.equal(again[1], logprobs)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_a_full_vocabulary_in_a_graph(device: torch.device, spread: float) -> None:
    """Captured once, replayed over other logits and other parameters, against the twin."""
    logits = torch.zeros(6, 128_256, device=device)
    parameters = columns(6, device)
    sample_with_logprob(logits, *parameters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = sample_with_logprob(logits, *parameters)
    for filters in (FILTERS, {"temperature": [0.0, 1.0] * 3, "seed": list(range(6))}):
        logits.copy_(torch.randn_like(logits) * spread)
        for held, new in zip(parameters, columns(6, device, **filters), strict=True):
            held.copy_(new)
        graph.replay()
        expected = reference_sampling.sample_with_logprob(logits, *parameters)
        assert torch.equal(tokens, expected[0])
        assert (logprobs - expected[1]).abs().max() < 1e-4

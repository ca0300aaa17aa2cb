"""Sampling against a brute-force account of what may be drawn, and against the distributions it promises.

In Triton's interpreter a row takes a tenth of a second: tests of thousands of rows run the torch twin there, and the
kernels are held against it row by row.
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
from kernels.sampling import _Draw, gumbel_noise, log_probs, philox4x32, sample, sample_with_logprob
from kernels.sampling_kernels import DRAWN, LAST, LOWEST, _quick_noise

DRAWN_CASES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and not interpreter_on(), reason="the Triton kernels run neither here nor interpreted"
)
MASS_ERROR = 1e-5  # promised: how closely the mass before a token is known


def columns(
    rows: int,
    device: torch.device,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int | list[int] = 0,
    position: int | list[int] | None = None,
) -> list[Tensor]:
    """The parameters as ``sample`` takes them, scalars spread over the rows; positions default to 0, 1, 2 …"""

    def column(value: object, dtype: torch.dtype) -> Tensor:
        values = value if isinstance(value, list) else [value] * rows
        return torch.tensor(values, dtype=dtype, device=device)

    return [
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(list(range(rows)) if position is None else position, torch.int64),
    ]


def draw(logits: Tensor, parameters_on: torch.device | None = None, **parameters: Any) -> Tensor:
    """``sample`` with ``columns``."""
    return sample(logits, *columns(logits.shape[0], parameters_on or logits.device, **parameters))


def draw_many(logits: Tensor, **parameters: Any) -> Tensor:
    """``draw`` for thousands of rows: compiled kernels or the twin, whichever serves this device at full speed."""
    given = columns(logits.shape[0], logits.device, **parameters)
    if logits.is_cuda:
        return sample(logits, *given)
    return reference_sampling.sample_with_logprob(logits, *given)[0]


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """What may be drawn and how likely: one row, in plain Python, one filter after the other."""
    largest = max(logits)
    weight = {token: math.exp((value - largest) / temperature) for token, value in enumerate(logits)}
    order = sorted(weight, key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    top_p = torch.tensor(top_p, dtype=torch.float32).item()  # what the sampler is given
    if top_p < 1:
        total, mass, kept = sum(weight[token] for token in order), 0.0, []
        for token in order:
            kept.append(token)
            mass += weight[token]
            if mass >= top_p * total:
                break
        order = kept
    order = [token for token in order if weight[token] >= min_p]
    total = sum(weight[token] for token in order)
    return {token: weight[token] / total for token in order}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers published with the generator (Random123, kat_vectors, philox4x32 10)
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    device: torch.device, counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], device=device) for word in counter)
    k0, k1 = (torch.tensor([word], device=device) for word in key)
    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == words


def test_noise_is_laid_out_as_documented(device: torch.device) -> None:
    seed, position, vocab = -(2**63) + 5, 2**35 + 9, 11
    noise = gumbel_noise(torch.tensor([seed], device=device), torch.tensor([position], device=device), vocab)[0]
    key = [torch.tensor(word, device=device) for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)]
    for token in range(vocab):
        counter = [torch.tensor(word, device=device) for word in (token // 4, position & 0xFFFFFFFF, position >> 32, 0)]
        word = int(philox4x32((counter[0], counter[1], counter[2], counter[3]), (key[0], key[1]))[token % 4])
        expected = -math.log(-math.log1p(-(word + 0.5) / 2**32))
        assert noise[token].item() == pytest.approx(expected, rel=1e-12)


def test_noise_has_the_gumbel_distribution(device: torch.device) -> None:
    """Kolmogorov-Smirnov: 200 000 values stay within 1.95 / sqrt(n), passed by 99.9 % of honest samples."""
    seeds = torch.arange(100, device=device)
    noise = gumbel_noise(seeds, seeds * 7 + 3, 2000).flatten().sort().values
    exact = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, noise.numel() + 1, device=device) / noise.numel()
    assert (exact - steps).abs().max().item() < 1.95 / math.sqrt(noise.numel())


def test_noise_differs_by_seed_bits_position_and_token(device: torch.device) -> None:
    seeds = torch.tensor([0, 1, 2**32, -(2**63), 0, 0, 0], device=device)
    positions = torch.tensor([0, 0, 0, 0, 1, 2**32, 4], device=device)
    noise = gumbel_noise(seeds, positions, 1000)
    assert noise.unique().numel() > 0.999 * noise.numel()


def test_temperature_zero_takes_the_likeliest(device: torch.device) -> None:
    logits = torch.randn(6, 301, device=device)
    logits[1, [40, 7, 200]] = 9.0  # equals: the lowest id
    logits[2, 5:] = -math.inf
    expected = logits.argmax(-1)
    assert expected[1] == 7
    filters: dict[str, Any] = {"top_k": 3, "top_p": 0.5, "min_p": 0.9}
    assert torch.equal(draw(logits, temperature=0.0, **filters), expected)
    mixed = draw(logits, temperature=[0.0, 0.0, 0.0, 1.0, 2.0, 0.0], **filters)
    assert torch.equal(mixed[[0, 1, 2, 5]], expected[[0, 1, 2, 5]])


def test_tiny_temperature_takes_the_likeliest(device: torch.device) -> None:
    logits = torch.randn(4, 50, device=device) * 100
    assert torch.equal(draw(logits, temperature=[1e-4, 1e-10, 1e-30, 1e-45]), logits.argmax(-1))


SETTINGS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.5, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.15),
    (1.3, 8, 0.7, 0.05),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (2.0, 100, 0.999, 1.0),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_draws_follow_the_distribution(
    device: torch.device, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """20 000 draws at successive positions: nothing outside the support; chi-square below its 99.99 % quantile."""
    row = torch.randn(24) * 1.5
    draws = 20_000
    tokens = draw_many(
        row.to(device).expand(draws, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=2**40 + 17,
    ).cpu()
    counts = torch.bincount(tokens, minlength=24).tolist()
    probability = allowed(row.tolist(), temperature, top_k, top_p, min_p)
    assert all(count == 0 for token, count in enumerate(counts) if token not in probability)
    expected = {token: p * draws for token, p in probability.items()}
    frequent = [token for token, number in expected.items() if number >= 5]
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in frequent)
    freedom = max(1, len(frequent) - 1)
    # Wilson and Hilferty's approximation of the quantile; 3.719 is the normal one.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit
    distance = sum(abs(counts[token] / draws - p) for token, p in probability.items()) / 2
    assert distance < 0.02


@DRAWN_CASES
@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.3, 0.61, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_support_is_exact(
    device: torch.device, values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """Ties abound among small integers: of equals, exactly the lower ids are kept."""
    logits = torch.tensor(values, dtype=torch.float32, device=device).expand(3000, -1)
    filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    seen = set(draw_many(logits, temperature=temperature, seed=seed, **filters).tolist())
    probability = allowed([float(value) for value in values], temperature, top_k, top_p, min_p)
    assert seen <= set(probability)
    # A token of probability p is missed by all 3000 draws with a chance of exp(-3000 p).
    assert {token for token, p in probability.items() if p > 0.01} <= seen


def test_top_k_keeps_exactly_k_of_equals(device: torch.device) -> None:
    logits = torch.zeros(2000, 40, device=device)
    assert set(draw_many(logits, top_k=7).tolist()) == set(range(7))
    assert set(draw_many(logits, top_p=0.12).tolist()) == set(range(5))


def test_barred_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((500, 64), -math.inf, device=device)
    logits[:, [9, 33]] = torch.tensor([1.0, -1.0], device=device)
    choices: list[dict[str, Any]] = [{}, {"top_k": 10}, {"top_p": 0.999}, {"min_p": 0.001}]
    for filters in choices:
        assert set(draw_many(logits, temperature=3.0, **filters).tolist()) == {9, 33}


def test_a_draw_depends_on_seed_position_and_logits_only(device: torch.device) -> None:
    """The same row alone, elsewhere in other batches, beside greedy and filtered rows; and on the CPU."""
    rows, vocab = 12, 997
    logits = torch.randn(rows, vocab, device=device) * 2
    mixed: dict[str, Any] = {
        "temperature": [0.0, 1.0, 0.5, 2.0] * 3,
        "top_k": [0, 50, 0, 0, 3, 0] * 2,
        "top_p": [1.0, 1.0, 0.9, 0.4] * 3,
        "min_p": [0.0, 0.0, 0.1] * 4,
        "seed": [7, -1, 2**62, 7] * 3,
        "position": [5, 2**33, 17] * 4,
    }
    together = draw(logits, **mixed)
    for picked in ([3], [5], [11, 2, 7], [8, 8, 1, 0]):
        part: dict[str, Any] = {name: [values[row] for row in picked] for name, values in mixed.items()}
        assert torch.equal(draw(logits[picked], **part), together[picked])
    twin, _ = reference_sampling.sample_with_logprob(logits.cpu(), *columns(rows, torch.device("cpu"), **mixed))
    assert torch.equal(twin, together.cpu())
    assert torch.equal(draw(logits, **mixed, parameters_on=torch.device("cpu")), together)


def test_draws_differ_from_position_to_position_and_seed_to_seed(device: torch.device) -> None:
    logits = torch.zeros(400, 1000, device=device)
    by_position = draw_many(logits, seed=3)
    by_seed = draw_many(logits, seed=list(range(400)), position=3)
    for tokens in (by_position, by_seed):
        assert 300 < tokens.unique().numel() < 360  # 400 honest draws of 1000 leave about 330 different ones


def test_log_probs(device: torch.device) -> None:
    logits = torch.randn(5, 200, device=device) * 4
    logits[2] += 1000.0
    token_ids = torch.tensor([0, 199, 5, 17, 3], device=device)
    chosen, ids, values = log_probs(logits, token_ids, 6)
    exact = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    assert chosen.dtype == values.dtype == torch.float32
    assert (chosen.double() - exact.gather(1, token_ids[:, None])[:, 0]).abs().max() < 1e-5
    assert torch.equal(ids, exact.argsort(dim=-1, descending=True)[:, :6])
    assert (values.double() - exact.gather(1, ids)).abs().max() < 1e-5


def test_log_probs_of_equals_and_of_none(device: torch.device) -> None:
    token_ids = torch.tensor([2], device=device)
    chosen, ids, values = log_probs(torch.zeros(1, 4, device=device), token_ids, 9)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert values.tolist() == [pytest.approx([-math.log(4)] * 4)]
    assert chosen.item() == pytest.approx(-math.log(4))
    _, ids, values = log_probs(torch.zeros(1, 4, device=device), token_ids, 0)
    assert ids.shape == values.shape == (1, 0)


def test_a_parameter_of_another_length_is_refused(device: torch.device) -> None:
    logits, column = torch.zeros(3, 8, device=device), torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"top_p is \(2,\) but logits have 3 rows"):
        sample(logits, column, column.int(), column[:2], column, column.long(), column.long())


# What the kernels keep, read from their workspace, against sorting in float64.


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
    vocab = data.draw(st.sampled_from([1, 2, 5, 63, 256, 1000, 4095, 4097]), label="vocab")
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
    logits = torch.randn(6, 1000, device=device) * 2
    types = [torch.float64, torch.int64, torch.float64, torch.float64, torch.int64, torch.int64]
    given = columns(6, torch.device("cpu"), **FILTERS)
    assert_like_the_twin(logits, [values.to(dtype) for values, dtype in zip(given, types, strict=True)])


@jit
def quick_noise_kernel(words, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, _quick_noise(tl.load(words + place).to(tl.uint32)))


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


@needs_kernels
def test_scores_that_come_close_are_compared_in_float64(device: torch.device) -> None:
    """A margin that calls every comparison close changes no token."""
    logits = torch.randn(6, 5003, device=device)
    parameters = columns(6, device, **FILTERS)
    expected, _ = reference_sampling.sample_with_logprob(logits, *parameters)
    assert torch.equal(_Draw(logits, *parameters).run(margin=1e9)[0], expected)


@needs_kernels
def test_a_row_does_not_depend_on_the_batch(device: torch.device) -> None:
    """Bit for bit: alone, in another order, and as a view into wider rows whose other columns are NaN."""
    wide = torch.full((6, 4400), math.nan, device=device)
    wide[:, :4224] = torch.randn(6, 4224, device=device) * 3
    logits = wide[:, :4224]
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
    logits = torch.randn(8, 700, device=device)
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
        assert ((tokens >= 0) & (tokens < 700)).all()
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

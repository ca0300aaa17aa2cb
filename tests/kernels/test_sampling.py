"""Sampling against a brute-force account of what may be drawn, and against the distributions it promises.

In Triton's interpreter a row takes a tenth of a second: tests of thousands of rows run the torch twin there, and
test_sampling_kernels.py holds the kernels against it.
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
from kernels.sampling import gumbel_noise, log_probs, philox4x32, sample
from tests.kernels.sampling_rows import columns

DRAWN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@DRAWN
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

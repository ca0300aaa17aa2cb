"""Penalties, biases and masks: the kernel against the torch twin bit for bit, both against transformers' processors."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from kernels import reference_sampling
from kernels.dispatch import interpreter_on
from kernels.logit_changes import ChangeState, LogitChanges
from kernels.sampling import sample_with_logprob
from tests.kernels.sampling_rows import columns

VOCAB = 4097  # two chunks, odd
BIASES = 16
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() and not interpreter_on(), reason="the Triton kernels run neither here nor interpreted"
)


def bits_of(allowed: Tensor) -> Tensor:
    """(rows, ceil(vocab / 32)) int32 masks of ``allowed`` (rows, vocab) bool."""
    rows, vocab = allowed.shape
    padded = torch.zeros(rows, -(-vocab // 32) * 32, dtype=torch.int64)
    padded[:, :vocab] = allowed.long()
    words = (padded.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def poisoned(places: int, vocab: int, device: torch.device) -> ChangeState:
    """A state of which nothing may be used before it is written."""
    state = ChangeState.empty(places, vocab, BIASES, device)
    for entry in fields(state):
        tensor = getattr(state, entry.name)
        tensor.fill_(math.nan if tensor.is_floating_point() else 2**30 + 1)
    return state


def give(
    state: ChangeState,
    place: int,
    *,
    counts: Tensor | None = None,
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    biases: dict[int, float] | None = None,
) -> None:
    """Write a row's place."""
    if counts is not None:
        state.counts[place] = counts.to(state.counts.device)
    state.penalties[place] = torch.tensor(penalties)
    state.bias_ids[place] = -1
    for entry, (token, bias) in enumerate((biases or {}).items()):
        state.bias_ids[place, entry] = token
        state.biases[place, entry] = bias


def mixed(device: torch.device, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> tuple[Tensor, LogitChanges]:
    """Eight rows: plain ones, and ones with each kind of change, alone and together, in places of no order."""
    logits = (torch.randn(8, vocab) * 4).to(dtype)
    logits[:, 7] = 0.0
    state = poisoned(9, vocab, device)
    counts = torch.randint(0, 12, (9, vocab), dtype=torch.int32) * (torch.rand(9, vocab) < 0.3)
    give(state, 8, counts=counts[8], penalties=(1.3, 0.0, 0.0))
    give(state, 2, counts=counts[2], penalties=(1.0, 0.7, 0.0))
    give(state, 5, counts=counts[5], penalties=(1.0, 0.0, -1.9))
    give(state, 0, biases={3: 4.5, vocab - 1: 20.0, 4095: 19.25, 11: -100.0})
    give(state, 3)
    give(state, 7, counts=counts[7], penalties=(0.8, -0.1, 0.3), biases={4090: 0.1, 0: 3.0})
    allowed = torch.rand(2, vocab) < 0.01
    allowed[:, 4095] = True
    state.masks[:2] = bits_of(allowed).to(device)
    places = torch.tensor([-1, 8, 2, 5, 0, 3, 7, -1], dtype=torch.int32, device=device)
    mask_rows = torch.tensor([-1, -1, -1, -1, -1, 1, 0, -1], dtype=torch.int32, device=device)
    return logits.to(device), LogitChanges(state, places, mask_rows)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_logits_are_the_twins_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    logits, changes = mixed(device, dtype)
    before = logits.clone()
    expected = reference_sampling.changed_logits(logits, changes)
    changes.write(logits)
    for row, place in enumerate(changes.places.tolist()):
        if place >= 0:
            assert torch.equal(changes.state.changed[place], expected[row]), row
    assert torch.equal(logits, before)
    for place in (1, 4, 6):
        assert changes.state.changed[place].isnan().all()


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"min_p": 0.1}, {"temperature": 0.0}, {"top_k": 500, "top_p": 0.9}],
)
def test_what_is_drawn_and_counted_is_the_twins(device: torch.device, options: dict[str, float]) -> None:
    logits, changes = mixed(device)
    parameters = columns(8, device, **options, seed=list(range(8)))  # pyright: ignore[reportArgumentType]
    counts = changes.state.counts.clone()
    expected, probabilities = reference_sampling.sample_with_logprob(logits, *parameters, changes=changes)
    counted = changes.state.counts.clone()
    changes.state.counts.copy_(counts)
    tokens, logprobs = sample_with_logprob(logits, *parameters, changes=changes)
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(changes.state.counts, counted)
    assert int((counted - counts).sum()) == 2 * 6
    torch.testing.assert_close(logprobs, probabilities, rtol=1e-5, atol=1e-5)
    assert not logprobs.isnan().any()
    raw = torch.log_softmax(logits.float(), -1)
    torch.testing.assert_close(logprobs, raw.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_rows_without_changes_are_drawn_as_without_the_others(device: torch.device) -> None:
    logits, changes = mixed(device)
    parameters = columns(8, device, top_p=0.9, seed=list(range(8)))
    plain = sample_with_logprob(logits, *parameters)
    tokens, logprobs = sample_with_logprob(logits, *parameters, changes=changes)
    nobody = LogitChanges(poisoned(2, VOCAB, device), torch.full_like(changes.places, -1), changes.mask_rows)
    for row in (0, 7):
        assert (tokens[row], logprobs[row]) == (plain[0][row], plain[1][row])
    for one, other in zip(plain, sample_with_logprob(logits, *parameters, changes=nobody), strict=True):
        assert torch.equal(one, other)
    assert nobody.state.changed.isnan().all()


def test_a_row_of_which_every_token_is_barred_fails_alone(device: torch.device) -> None:
    logits, changes = mixed(device)
    changes.state.masks[0] = 0
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        parameters = columns(8, device, **options)  # pyright: ignore[reportArgumentType]
        tokens, logprobs = sample_with_logprob(logits, *parameters, changes=changes)
        assert logprobs.isnan().tolist() == [row == 6 for row in range(8)]
        assert bool(((tokens >= 0) & (tokens < VOCAB)).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_changed_row_of_useless_raw_logits_is_told_although_they_are_barred(device: torch.device, bad: float) -> None:
    logits, changes = mixed(device)
    row = changes.mask_rows.tolist().index(1)
    allowed = reference_sampling.changed_logits(logits, changes)[row] > -math.inf
    logits[row, int((~allowed).nonzero()[0])] = bad
    _, logprobs = sample_with_logprob(logits, *columns(8, device), changes=changes)
    assert logprobs.isnan().nonzero().flatten().tolist() == [row]


def test_penalties_and_biases_are_transformers(device: torch.device) -> None:
    hf = pytest.importorskip("transformers.generation.logits_process")
    vocab, prompt, generated = 300, [5, 9, 9, 250], [7, 5, 7]
    logits = torch.randn(3, vocab) * 4
    ids = torch.tensor([prompt + generated])
    state = poisoned(3, vocab, device)
    counts = torch.zeros(vocab, dtype=torch.int32)
    for token in set(prompt):
        counts[token] += 1
    for token in generated:
        counts[token] += 2
    give(state, 0, counts=counts, penalties=(1.7, 0.0, 0.0))
    give(state, 1, biases={7: -2.5, 200: 3.25})
    give(state, 2)
    allowed = torch.ones(1, vocab, dtype=torch.bool)
    allowed[0, [2, 3]] = False
    state.masks[0] = bits_of(allowed)[0].to(device)
    every = torch.arange(3, dtype=torch.int32, device=device)
    changes = LogitChanges(state, every, torch.tensor([-1, -1, 0], dtype=torch.int32, device=device))
    parameters = columns(3, device, temperature=0.0)
    sample_with_logprob(logits.to(device), *parameters, changes=changes)
    changed = reference_sampling.changed_logits(logits.to(device), changes).cpu()
    processors = (
        hf.RepetitionPenaltyLogitsProcessor(1.7),
        hf.SequenceBiasLogitsProcessor([[[7], -2.5], [[200], 3.25]]),
        hf.MinNewTokensLengthLogitsProcessor(len(prompt), 4, [2, 3]),
    )
    for row, processor in enumerate(processors):
        expected = processor(ids, logits[row : row + 1].clone())[0]
        if row == 0:  # the draw was counted meanwhile
            drawn = int(((state.counts[0].cpu() - counts) != 0).nonzero())
            assert drawn == int(expected.argmax())
            changed[0, drawn] = expected[drawn]
        assert torch.equal(changed[row], expected), row


def test_frequency_and_presence_are_openais(device: torch.device) -> None:
    logits = torch.randn(1, 50, device=device) * 3
    state = poisoned(1, 50, device)
    counts = torch.zeros(50, dtype=torch.int32)
    counts[4], counts[6], counts[9] = 2 * 3, 2 * 1 + 1, 1  # three times, once, and in the prompt alone
    give(state, 0, counts=counts, penalties=(1.0, 0.5, 0.25))
    one = torch.zeros(1, dtype=torch.int32, device=device)
    changed = reference_sampling.changed_logits(logits, LogitChanges(state, one, one - 1))
    expected = logits.double()
    expected[0, 4] -= 3 * 0.5 + 0.25
    expected[0, 6] -= 0.5 + 0.25
    assert torch.equal(changed, expected.float())


def test_changes_of_another_number_of_rows_are_refused(device: torch.device) -> None:
    logits, changes = mixed(device)
    with pytest.raises(ValueError, match="changes are of 8 rows but logits have 7"):
        sample_with_logprob(logits[:7], *columns(7, device), changes=changes)


@pytest.mark.gpu
def test_changes_are_part_of_a_graph() -> None:
    device = torch.device("cuda")
    logits, changes = mixed(device, torch.bfloat16, 128256)
    parameters = columns(8, device, top_p=0.9, seed=list(range(8)))
    start = changes.state.counts.clone()
    sample_with_logprob(logits, *parameters, changes=changes)
    changes.state.counts.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = sample_with_logprob(logits, *parameters, changes=changes)
    for _ in range(3):
        before = changes.state.counts.clone()
        graph.replay()
        got = tokens.tolist(), logprobs.clone(), changes.state.counts.clone()
        changes.state.counts.copy_(before)
        again = sample_with_logprob(logits, *parameters, changes=changes)
        assert got[0] == again[0].tolist()
        assert torch.equal(got[1], again[1])
        assert torch.equal(got[2], changes.state.counts)
        assert not torch.equal(before, got[2])

"""Torch twin of ``kernels.sampling``: plain operations on any device, a sort where the kernels bisect.

Everything between the logits and the choice is float64: backends differ in the last bit of exp and log, and in fp32
that would now and then change the winner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.logit_changes import LogitChanges

_LOW32 = 0xFFFFFFFF
_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def sample_with_logprob(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    changes: LogitChanges | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids (rows,) int64 and their raw log probabilities (rows,) fp32; see ``kernels.sampling``."""
    if changes is not None and bool((changes.places >= 0).any()):
        seen = changed_logits(logits, changes)
        tokens, _ = sample_with_logprob(seen, temperature, top_k, top_p, min_p, seed, position)
        rows = torch.nonzero(changes.places >= 0).flatten()
        changes.state.counts.index_put_(
            (changes.places[rows].long(), tokens[rows]), torch.full_like(changes.places[rows], 2), accumulate=True
        )
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None]).squeeze(1)
        return tokens, logprobs.masked_fill(seen.amax(-1) == float("-inf"), float("nan"))
    tokens = logits.argmax(dim=-1)
    drawn = torch.nonzero(temperature > 0).flatten()
    if drawn.numel():
        parameters = (temperature, top_k, top_p, min_p, seed, position)
        chosen = _draw(logits, drawn, *(values[drawn.to(values.device)] for values in parameters))
        tokens.index_copy_(0, _to(drawn, logits.device), chosen)
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[:, None]).squeeze(1)
    return tokens, logprobs


def changed_logits(logits: Tensor, changes: LogitChanges) -> Tensor:
    """A copy (rows, vocab) fp32 of ``logits``, changed where a row has a place; see ``LogitChanges.write``."""
    vocab, state = logits.shape[1], changes.state
    rows = torch.nonzero(changes.places >= 0).flatten()
    places = changes.places[rows].long()
    repetition, frequency, presence = (state.penalties[places, which, None].double() for which in range(3))
    counts = state.counts[places]
    times = counts >> 1
    raw = logits[rows].double()
    picked = torch.where(counts != 0, torch.where(raw > 0, raw / repetition, raw * repetition), raw)
    picked = picked - frequency * times - torch.where(times > 0, presence, 0.0)
    # A row without penalties has no counts.
    penalised = (repetition != 1) | (frequency != 0) | (presence != 0)
    picked = torch.where(penalised, picked, raw).float()
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    mask_rows = changes.mask_rows[rows].long()
    allowed = ((state.masks[mask_rows.clamp(min=0), :, None] >> bits) & 1).flatten(1)[:, :vocab] != 0
    picked = picked.masked_fill(~(allowed | (mask_rows < 0)[:, None]), float("-inf"))
    biased = torch.nonzero(state.bias_ids[places] >= 0)
    tokens = state.bias_ids[places[biased[:, 0]], biased[:, 1]].long()
    picked[biased[:, 0], tokens] += state.biases[places[biased[:, 0]], biased[:, 1]]
    return logits.float().index_copy(0, rows, picked)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of random bits for each counter and key.

    Words are int64 tensors holding 0 .. 2**32 - 1, of shapes that broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap to the same 64 bits as unsigned ones; the mask drops the copied sign bits.
        even, odd = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0, c2 = ((odd >> 32) & _LOW32) ^ c1 ^ k0, ((even >> 32) & _LOW32) ^ c3 ^ k1
        c1, c3 = odd & _LOW32, even & _LOW32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW32, (k1 + _KEY_STEPS[1]) & _LOW32
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise (rows, vocab) float64, a pure function of (seed, position, token id).

    seed, position: (rows,) int64. Philox's key is the seed; its counter is (token // 4, position), and token t
    takes word t % 4 of what that gives, so four neighbours share one evaluation.
    """
    seed, position = seed.long()[:, None], position.long()[:, None]
    block = torch.arange((vocab + 3) // 4, device=seed.device)[None, :]
    zero = torch.zeros_like(position)
    words = philox4x32(
        (block, position & _LOW32, (position >> 32) & _LOW32, zero), (seed & _LOW32, (seed >> 32) & _LOW32)
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab]
    # A token wins by a small exponential, -log(1 - u): u near 0 is where floats are dense.
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def kept_scores(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """``(logits - largest) / temperature`` (rows, vocab) float64, -inf for every token that the filters drop.

    temperature, top_k, top_p, min_p: (rows,), on the logits' device or the CPU; temperature above 0.
    """
    device, vocab = logits.device, logits.shape[1]
    picked = logits.double()
    # Relative to the likeliest token: a tiny temperature then drives the others to -inf and never to inf.
    scaled = (picked - picked.amax(-1, keepdim=True)) / _to(temperature, device).double()[:, None]
    ranked = torch.nonzero(((top_k > 0) & (top_k < vocab)) | (top_p.to(top_k.device) < 1)).flatten()
    if ranked.numel():
        kept = _keep_top(
            scaled.index_select(0, _to(ranked, device)),
            _to(top_k[ranked], device),
            _to(top_p[ranked.to(top_p.device)], device),
        )
        scaled.index_copy_(0, _to(ranked, device), kept)
    # scaled is log(p / p_max), so min-p needs no softmax; log(0) keeps all.
    floor = torch.log(_to(min_p, device).double())[:, None]
    return scaled.masked_fill_(scaled < floor, float("-inf"))


def _draw(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """The drawn token of each of ``rows`` (indices into logits); the parameters are theirs alone."""
    device, vocab = logits.device, logits.shape[1]
    scores = kept_scores(logits.index_select(0, _to(rows, device)), temperature, top_k, top_p, min_p)
    return (scores + gumbel_noise(_to(seed, device), _to(position, device), vocab)).argmax(dim=-1)


def _keep_top(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """``scaled`` (rows, vocab) float64 with everything outside the top-k and then the top-p set to -inf."""
    vocab = scaled.shape[1]
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    limit = torch.where(top_k > 0, top_k, vocab)[:, None]
    keep = torch.arange(vocab, device=scaled.device)[None, :] < limit
    mass = torch.softmax(ordered.masked_fill(~keep, float("-inf")), dim=-1)
    before = mass.cumsum(-1) - mass
    wanted = top_p.double()[:, None]
    reached = (before >= wanted) & (wanted < 1)
    reached[:, 0] = False
    keep &= ~reached
    return torch.full_like(scaled, float("-inf")).scatter_(1, ids, ordered.masked_fill_(~keep, float("-inf")))


def _to(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)

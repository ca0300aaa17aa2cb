"""The Triton kernel of ``kernels.logit_changes``, which says what it computes."""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.sampling_row import CHUNK


@jit
def _penalised(x, count, repetition, frequency, presence):
    """Float64, in which both products are exact: fused or not, the same numbers come out."""
    y = x.to(tl.float64)
    factor = repetition.to(tl.float64)
    y = tl.where(count != 0, tl.where(y > 0, y / factor, y * factor), y)
    times = count >> 1
    y -= frequency.to(tl.float64) * times.to(tl.float64)
    y -= tl.where(times > 0, presence.to(tl.float64), 0.0)
    return y.to(tl.float32)


@jit(do_not_specialize=["row_stride", "vocab", "words"])
def change_kernel(
    logits,
    row_stride,
    places,
    mask_rows,
    counts,
    penalties,
    bias_ids,
    biases,
    masks,
    words,
    changed,
    vocab,
    BIASES: tl.constexpr,
):
    """Grid (rows, chunks). A program of a row without a place ends at once."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    if place >= 0:
        chunk = tl.program_id(1)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = ids < vocab
        x = tl.load(logits + row * row_stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
        repetition = tl.load(penalties + place * 3)
        frequency = tl.load(penalties + place * 3 + 1)
        presence = tl.load(penalties + place * 3 + 2)
        if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
            count = tl.load(counts + place * vocab + ids, mask=inside, other=0)
            x = _penalised(x, count, repetition, frequency, presence)
        mask_row = tl.load(mask_rows + row).to(tl.int64)
        if mask_row >= 0:
            word = tl.load(masks + mask_row * words + ids // 32, mask=inside, other=0)
            x = tl.where(((word >> (ids % 32)) & 1) != 0, x, float("-inf"))
        target = changed + place * vocab
        tl.store(target + ids, x, mask=inside)
        entry = place * BIASES + tl.arange(0, BIASES)
        if tl.load(bias_ids + place * BIASES) >= 0:
            tl.debug_barrier()  # the threads that add the biases are others than those that stored
            token = tl.load(bias_ids + entry)
            here = (token >= chunk * CHUNK) & (token < (chunk + 1) * CHUNK)
            biased = tl.load(target + token, mask=here, other=0.0) + tl.load(biases + entry, mask=here, other=0.0)
            tl.store(target + token, biased, mask=here)

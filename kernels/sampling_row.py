"""What the sampling kernels share: where a row's results lie between launches, and the order of its logits."""

from __future__ import annotations

from typing import Any

from kernels.dispatch import HAS_TRITON, jit, tl


def _constant(value: int | float) -> Any:
    """A module constant that kernels may use."""
    return tl.constexpr(value) if HAS_TRITON else value


CHUNK = _constant(4096)  # tokens
STRIP = _constant(256)  # tokens of a chunk that are held against all marks at once
MARKS = _constant(16)
SAMPLE = _constant(256)  # tokens of the row from which its marks are taken
PROBES = _constant(8)  # thresholds tried in one pass over a bin

# Where a row's words lie; the marks come first.
TOP = _constant(16)  # float: the largest logit; of a changed row, as changed
LOG_SUM = _constant(17)  # float: log of the sum of exp(logit - largest), of the raw logits
LIKELIEST = _constant(18)  # its token
DRAWN = _constant(19)  # 1: a token is drawn; 0: the likeliest is taken
LOWEST = _constant(20)  # image of the threshold
LAST = _constant(21)  # the last id that is kept among logits equal to the threshold
RAW_TOP = _constant(22)  # float: the largest raw logit
CHUNKS = _constant(24)  # from here BLOCK_C words each: maxima, their ids, sums of the raw row, winners, maxima of the
#                         raw row; then MARKS times as many: counts and masses, chunk by chunk
WORDS_PER_CHUNK = _constant(5 + 2 * 16)

MARGIN = _constant(2.0**-13)  # between fp32 scores, each of which is within 5e-5 of the exact one
LARGEST_INT = _constant(0x7FFFFFFF)
BARRED = _constant(-2139095041)  # image of -inf
LOWEST_FINITE = _constant(-2139095040)  # image of the lowest finite number
LOG2_E = _constant(1.4426950408889634)


@jit
def image_of(x):
    """int32 in the order of the fp32 numbers ``x``; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def number_of(image):
    """The fp32 number of an ``image_of``."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def pick(values, index):
    """``values[index]``, of a vector of MARKS."""
    return tl.sum(tl.where(tl.arange(0, MARKS) == index, values, 0))


@jit
def is_drawn(temperature, top_k):
    """Whether a row draws its token; otherwise it takes the likeliest."""
    return (temperature > 0) & (top_k != 1)


@jit
def is_ranked(top_k, top_p, vocab):
    """Whether top-k or top-p filters a row."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1)


@jit
def log2_scale(temperature):
    """log2(e) / temperature, fp32. Bounded: 0 times it is 0 at any temperature, and -inf times it is -inf."""
    return tl.minimum(tl.maximum(1.0 / temperature.to(tl.float64) * LOG2_E, 1e-30), 1e30).to(tl.float32)


@jit
def changed_row(places, changed, row, vocab, CHANGED: tl.constexpr):
    """(whether the row is drawn from its changed logits, where these start)."""
    place = tl.full((), -1, tl.int64)
    if CHANGED:
        place = tl.load(places + row).to(tl.int64)
    return place >= 0, changed + place * vocab


@jit
def logits_at(start, changed, is_changed, ids, inside):
    """fp32 logits of a row, -inf outside, changed or raw."""
    if is_changed:
        x = tl.load(changed + ids, mask=inside, other=float("-inf"))
    else:
        x = tl.load(start + ids, mask=inside, other=float("-inf")).to(tl.float32)
    return x

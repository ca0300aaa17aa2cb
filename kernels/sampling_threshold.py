"""The threshold of every row of ``kernels.sampling``: top-k by counting, top-p by mass, then min-p.

A bin is the logits between two neighbouring marks. The bin that holds the threshold is copied out of the row, and the
threshold found among its tokens by trying a few images at a time; so the whole row is read once or twice.
"""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.sampling_row import (
    CHUNK,
    CHUNKS,
    DRAWN,
    LARGEST_INT,
    LAST,
    LIKELIEST,
    LOG_SUM,
    LOWEST,
    LOWEST_FINITE,
    MARKS,
    PROBES,
    RAW_TOP,
    TOP,
    changed_row,
    image_of,
    is_drawn,
    is_ranked,
    log2_scale,
    logits_at,
    number_of,
    pick,
)


@jit
def _copy_bin(start, changed, is_changed, vocab, lower, upper, copied, copied_ids, GATHER: tl.constexpr):
    """Write a bin's logits and ids out of the row, one behind the other by ascending id."""
    tl.debug_barrier()  # everyone has read the bin that was here before
    base = 0
    offsets = tl.arange(0, GATHER)
    ahead = logits_at(start, changed, is_changed, offsets, offsets < vocab)
    for first in range(0, vocab, GATHER):
        x = ahead
        ids = first + offsets
        ahead = logits_at(start, changed, is_changed, ids + GATHER, ids + GATHER < vocab)
        inside = (image_of(x) >= lower) & (image_of(x) < upper)
        slot = base + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(copied + slot, x, mask=inside)
        tl.store(copied_ids + slot, ids, mask=inside)
        base += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()


@jit
def _bin_logits(offsets, copied, size, is_copied, start, changed, is_changed, vocab, lower, upper):
    """Logits of a bin, -inf where there is none: from the copy, or picked out of the row."""
    if is_copied:
        x = tl.load(copied + offsets, mask=offsets < size, other=float("-inf"))
    else:
        x = logits_at(start, changed, is_changed, offsets, offsets < vocab)
        image = image_of(x)
        x = tl.where((image >= lower) & (image < upper), x, float("-inf"))
    return x


@jit
def _largest_reaching(
    goal,
    low,
    high,
    by_mass,
    top,
    scale,
    copied,
    size,
    is_copied,
    start,
    changed,
    is_changed,
    vocab,
    lower,
    upper,
    TILE: tl.constexpr,
):
    """The largest image in low .. high - 1 at or above which a bin's tokens, or their mass, come to ``goal``."""
    span = tl.where(is_copied, size, vocab)
    while high - low > 1:
        step = (high - low + PROBES) // (PROBES + 1)
        probes = low + step * (1 + tl.arange(0, PROBES))
        bounds = number_of(tl.minimum(probes, high).to(tl.int32))
        reach = tl.zeros((PROBES,), tl.float64)
        for first in range(0, span, TILE):
            x = _bin_logits(
                first + tl.arange(0, TILE), copied, size, is_copied, start, changed, is_changed, vocab, lower, upper
            )
            weights = tl.where(by_mass, tl.exp2((x - top) * scale), 1.0)
            above = (x[None, :] >= bounds[:, None]).to(tl.float32)
            reach += tl.sum(above * weights[None, :], 1).to(tl.float64)
        low += step * tl.sum(((reach >= goal) & (probes < high)).to(tl.int64), 0)
        high = tl.minimum(high, low + step)
    return low


@jit
def _tally(
    edge, top, scale, copied, size, is_copied, start, changed, is_changed, vocab, lower, upper, TILE: tl.constexpr
):
    """Of a bin: how many tokens lie above ``edge``, their mass, and how many equal it. float64."""
    beyond = 0.0 * top.to(tl.float64)
    mass = beyond
    equals = beyond
    for first in range(0, tl.where(is_copied, size, vocab), TILE):
        x = _bin_logits(
            first + tl.arange(0, TILE), copied, size, is_copied, start, changed, is_changed, vocab, lower, upper
        )
        beyond += tl.sum((x > edge).to(tl.float32), 0)
        mass += tl.sum(tl.where(x > edge, tl.exp2((x - top) * scale), 0.0), 0)
        equals += tl.sum((x == edge).to(tl.float32), 0)
    return beyond, mass, equals


@jit
def _id_of_equal(
    edge, rank, copied, copied_ids, size, is_copied, start, changed, is_changed, vocab, lower, upper, TILE: tl.constexpr
):
    """The id of the ``rank``-th token, from 1, of a bin's tokens equal to ``edge``."""
    seen = 0
    found = -1
    for first in range(0, tl.where(is_copied, size, vocab), TILE):
        ids = first + tl.arange(0, TILE)
        equal = _bin_logits(ids, copied, size, is_copied, start, changed, is_changed, vocab, lower, upper) == edge
        if is_copied:
            ids = tl.load(copied_ids + ids, mask=ids < size, other=-1)
        order = seen + tl.cumsum(equal.to(tl.int32), 0)
        found = tl.maximum(found, tl.max(tl.where(equal & (order.to(tl.float64) == rank), ids, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return found


@jit
def _keep_ranked(
    k,
    p,
    scale,
    start,
    changed,
    is_changed,
    vocab,
    peaks,
    top,
    ints,
    floats,
    copied,
    copied_ids,
    capacity,
    BLOCK_C: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """LOWEST and LAST after top-k, by counts, and then top-p, by the mass of what top-k leaves."""
    chunk = tl.arange(0, BLOCK_C)
    real = (chunk < tl.cdiv(vocab, CHUNK))[:, None]
    mark = tl.arange(0, MARKS)
    marks = tl.load(ints + mark)
    place = chunk[:, None] * MARKS + mark[None, :] + (CHUNKS + 5 * BLOCK_C)
    counts = tl.sum(tl.load(ints + place, mask=real, other=0), 0).to(tl.float64)
    masses = tl.load(floats + place + BLOCK_C * MARKS, mask=real, other=0.0).to(tl.float64)
    masses = tl.sum(masses * tl.exp2((peaks - top) * scale).to(tl.float64)[:, None], 0)
    budget = pick(masses, MARKS - 1)
    lowest = LOWEST_FINITE
    room = 1.0e9 + 0.0 * p  # how many of the logits equal to the lowest are kept
    equals = 0.0 * p  # of how many
    last_bin = MARKS - 1
    held = -1  # the bin that size, lower and upper describe, and the copy holds
    size = 0
    lower = LOWEST_FINITE
    upper = LOWEST_FINITE
    for turn in range(2):
        by_mass = turn == 1
        goal = tl.where(by_mass, p * budget, k.to(tl.float64))
        if tl.where(by_mass, p < 1, (k > 0) & (goal < pick(counts, MARKS - 1))):
            sizes = tl.where(by_mass, masses, counts)
            here = tl.minimum(tl.sum((sizes < goal).to(tl.int32), 0), last_bin)
            last_bin = here
            if here != held:
                held = here
                lower = pick(marks, here)
                upper = tl.where(here > 0, pick(marks, here - 1), image_of(top) + 1)
                size = (pick(counts, here) - pick(counts, here - 1)).to(tl.int32)
                if size <= capacity:
                    _copy_bin(start, changed, is_changed, vocab, lower, upper, copied, copied_ids, GATHER)
            fits = size <= capacity
            goal -= pick(sizes, here - 1)
            low = tl.maximum(lower, lowest).to(tl.int64)
            low = _largest_reaching(
                goal,
                low,
                upper.to(tl.int64),
                by_mass,
                top,
                scale,
                copied,
                size,
                fits,
                start,
                changed,
                is_changed,
                vocab,
                lower,
                upper,
                TILE,
            )
            edge = number_of(low.to(tl.int32))
            beyond, mass, equals = _tally(
                edge, top, scale, copied, size, fits, start, changed, is_changed, vocab, lower, upper, TILE
            )
            weight = tl.exp2((edge - top) * scale).to(tl.float64)
            if by_mass:
                wanted = tl.maximum(tl.where(weight > 0, tl.ceil((goal - mass) / weight), equals), 1.0)
                room = tl.where(low == lowest, tl.minimum(wanted, room), wanted)
            else:
                room = goal - beyond
                budget = pick(masses, here - 1) + mass + room * weight
            lowest = low.to(tl.int32)
    last = LARGEST_INT
    if room < equals:
        fits = size <= capacity
        edge = number_of(lowest)
        last = _id_of_equal(
            edge, room, copied, copied_ids, size, fits, start, changed, is_changed, vocab, lower, upper, TILE
        )
    return lowest, last


@jit
def _lowest_likely(least, lowest, top, warmth):
    """The lowest image, from ``lowest`` on, whose logit min-p keeps. The test is the twin's, float64."""
    floor = tl.log(least)
    failing = (lowest - 1).to(tl.int64)
    passing = image_of(top).to(tl.int64)
    while passing - failing > 1:
        step = (passing - failing + 255) // 256
        probes = failing + step * (1 + tl.arange(0, 256))
        x = number_of(tl.minimum(probes, passing).to(tl.int32)).to(tl.float64)
        fails = ((x - top.to(tl.float64)) / warmth < floor) & (probes < passing)
        failing += step * tl.sum(fails.to(tl.int64), 0)
        passing = tl.minimum(passing, failing + step)
    return passing.to(tl.int32)


# row_stride: where the alignment of a tile is unknown each thread holds single, not neighbouring elements, as the
# stores of a compaction want it, and nothing moves between threads.
@jit(do_not_specialize=["row_stride", "vocab", "capacity"])
def threshold_kernel(
    logits,
    row_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    ints,
    floats,
    copied,  # (rows, capacity) fp32: the logits of a bin by ascending id
    copied_ids,  # (rows, capacity) int32
    capacity,
    places,
    changed,
    vocab,
    CHANGED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GATHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (rows,). Writes everything about a row that later launches need.

    A bin of more than ``capacity`` tokens, which takes many equal logits, is not copied but searched in the row.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    is_changed, changed = changed_row(places, changed, row, vocab, CHANGED)
    ints += row * WIDTH
    floats += row * WIDTH
    copied += row * capacity
    copied_ids += row * capacity
    chunk = tl.arange(0, BLOCK_C)
    real = chunk < tl.cdiv(vocab, CHUNK)
    peaks = tl.load(floats + CHUNKS + chunk, mask=real, other=float("-inf"))
    top = tl.max(peaks, 0)
    peak_ids = tl.load(ints + CHUNKS + BLOCK_C + chunk, mask=real, other=0)
    sums = tl.load(floats + CHUNKS + 2 * BLOCK_C + chunk, mask=real, other=0.0)
    raw_peaks = tl.load(floats + CHUNKS + 4 * BLOCK_C + chunk, mask=real, other=float("-inf"))
    raw_top = tl.max(raw_peaks, 0)
    total = tl.sum(sums.to(tl.float64) * tl.exp((raw_peaks - raw_top).to(tl.float64)), 0)
    tl.store(floats + TOP, top)
    tl.store(floats + RAW_TOP, raw_top)
    tl.store(floats + LOG_SUM, tl.log(total).to(tl.float32))
    tl.store(ints + LIKELIEST, tl.min(tl.where(peaks == top, peak_ids, vocab), 0))
    warmth = tl.load(temperature + row).to(tl.float64)
    k = tl.load(top_k + row)
    # NaN compares false: a row of no use is not drawn from.
    drawn = is_drawn(warmth, k) & (total < float("inf")) & (top > float("-inf")) & (top < float("inf"))
    tl.store(ints + DRAWN, drawn.to(tl.int32))
    if drawn:
        p = tl.load(top_p + row).to(tl.float64)
        lowest = LOWEST_FINITE
        last = LARGEST_INT
        if is_ranked(k, p, vocab):
            scale = log2_scale(warmth)
            lowest, last = _keep_ranked(
                k,
                p,
                scale,
                start,
                changed,
                is_changed,
                vocab,
                peaks,
                top,
                ints,
                floats,
                copied,
                copied_ids,
                capacity,
                BLOCK_C,
                GATHER,
                TILE,
            )
        least = tl.load(min_p + row).to(tl.float64)
        if least > 0:
            likely = _lowest_likely(least, lowest, top, warmth)
            last = tl.where(likely > lowest, LARGEST_INT, last)
            lowest = likely
        tl.store(ints + LOWEST, lowest)
        tl.store(ints + LAST, last)

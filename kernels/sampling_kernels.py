"""The Triton kernels of ``kernels.sampling``, which says what they compute and launches them.

Five launches, sized by shapes alone. What a row needs is decided on the device by its own parameters:

1. ``splitters_kernel``, a block a row: 16 marks that cut a filtered row's logits into bins of a few thousand;
2. ``chunk_kernel``, a block for each 4096 tokens: maximum, sum of exponentials and, in a filtered row, how many
   tokens and how much mass lie at or above each mark;
3. ``threshold_kernel``, a block a row: the lowest logit that stays. It copies the bin that holds the threshold out of
   the row and narrows it down there;
4. ``draw_kernel``, a block for each 4096 tokens: the chunk's winner among what stays;
5. ``finish_kernel``, a block a row: the winner of the winners, and its log probability.

All filters keep a head of the row's order (logit descending, id ascending), so what is kept is a threshold and an id:
logits above the threshold, and those equal to it up to that id. Logits are compared through ``_image``.

Chunks and tiles depend on the vocabulary alone, and every sum runs in a fixed order, so a row's result does not depend
on the batch around it. Results go from launch to launch through a workspace, ``WIDTH`` words a row: ``ints`` and
``floats`` are two views of it.
"""

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
TOP = _constant(16)  # float: the largest logit
LOG_SUM = _constant(17)  # float: log of the sum of exp(logit - largest)
LIKELIEST = _constant(18)  # its token
DRAWN = _constant(19)  # 1: a token is drawn; 0: the likeliest is taken
LOWEST = _constant(20)  # image of the threshold
LAST = _constant(21)  # the last id that is kept among logits equal to the threshold
CHUNKS = _constant(24)  # from here BLOCK_C words each: maxima, their ids, sums, winners; then MARKS times as many:
#                         counts and masses, chunk by chunk
WORDS_PER_CHUNK = _constant(4 + 2 * 16)

LARGEST_INT = _constant(0x7FFFFFFF)
BARRED = _constant(-2139095041)  # image of -inf
LOWEST_FINITE = _constant(-2139095040)  # image of the lowest finite number
LOG2_E = _constant(1.4426950408889634)


@jit
def _image(x):
    """int32 in the order of the fp32 numbers ``x``; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _number(image):
    """The fp32 number of an ``_image``."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _pick(values, index):
    """``values[index]``, of a vector of MARKS."""
    return tl.sum(tl.where(tl.arange(0, MARKS) == index, values, 0))


@jit
def _is_drawn(temperature, top_k):
    return (temperature > 0) & (top_k != 1)


@jit
def _is_ranked(top_k, top_p, vocab):
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1)


@jit
def _log2_scale(temperature):
    """log2(e) / temperature, fp32. Bounded: 0 times it is 0 at any temperature, and -inf times it is -inf."""
    return tl.minimum(tl.maximum(1.0 / temperature.to(tl.float64) * LOG2_E, 1e-30), 1e30).to(tl.float32)


@jit
def _random_words(seed, position, block):
    """The four words of Philox4x32-10 for counters (block, position) under the key ``seed``."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, high * 0)


@jit
def _random_word(seed, position, ids):
    """The word of each token: every four neighbours share an evaluation."""
    w0, w1, w2, w3 = _random_words(seed, position, ids // 4)
    return tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, w0, w1), tl.where(ids % 4 == 2, w2, w3))


@jit
def _exact_score(x, top, temperature, word):
    """Scaled logit plus Gumbel noise, float64 as in the torch twin. 1 - u is exact, so its log is as good as log1p."""
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    scaled = (x.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64)
    return scaled - tl.log(-tl.log(1.0 - uniform))


@jit
def _quick_noise(word):
    """Gumbel noise in fp32, within 2e-5. Small u by series: the logarithm of a rounded 1 - u would not do."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * (0.2 + u * 0.16666667)))))
    return -tl.log(tl.where(word < 0x10000000, series, -tl.log(rest)))


@jit(do_not_specialize=["vocab"])
def splitters_kernel(logits, row_stride, temperature, top_k, top_p, ints, vocab, WIDTH: tl.constexpr):
    """Grid (rows,). Marks from an evenly spaced sample: its ranks 1, 2, 4 … 32, where few tokens matter, then every
    24th. They decide how fast the threshold is found, not which it is. The last mark takes every finite logit."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row)
    if _is_drawn(tl.load(temperature + row), k) & _is_ranked(k, tl.load(top_p + row), vocab):
        start = logits + row * row_stride
        index = tl.arange(0, SAMPLE)
        image = _image(tl.load(start + (index.to(tl.int64) * vocab // SAMPLE)).to(tl.float32))
        rank = tl.zeros((SAMPLE,), tl.int32)
        for first in range(0, SAMPLE, 64):
            other = first + tl.arange(0, 64)
            rival = _image(tl.load(start + (other.to(tl.int64) * vocab // SAMPLE)).to(tl.float32))
            sooner = (rival[:, None] == image[None, :]) & (other[:, None] < index[None, :])
            rank += tl.sum(((rival[:, None] > image[None, :]) | sooner).to(tl.int32), 0)
        mark = tl.arange(0, MARKS)
        wanted = tl.where(mark < 6, (1 << mark) - 1, 24 * mark - 89)
        found = tl.max(tl.where(rank[None, :] == wanted[:, None], image[None, :], BARRED), 1)
        found = tl.where(mark == MARKS - 1, LOWEST_FINITE, tl.maximum(found, LOWEST_FINITE))
        tl.store(ints + row * WIDTH + mark, found)


@jit(do_not_specialize=["vocab"])
def chunk_kernel(
    logits, row_stride, temperature, top_k, top_p, ints, floats, vocab, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Grid (rows, chunks). Masses are relative to the chunk's largest logit."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = logits + row * row_stride
    ints += row * WIDTH
    floats += row * WIDTH
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(start + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    place = chunk + CHUNKS
    tl.store(floats + place, top)
    tl.store(ints + place + BLOCK_C, tl.min(tl.where(x == top, ids, vocab), 0))
    tl.store(floats + place + 2 * BLOCK_C, tl.sum(tl.exp(x - base), 0))
    warmth = tl.load(temperature + row)
    k = tl.load(top_k + row)
    if _is_drawn(warmth, k) & _is_ranked(k, tl.load(top_p + row), vocab):
        mark = tl.arange(0, MARKS)
        marks = _number(tl.load(ints + mark))
        scale = _log2_scale(warmth)
        counts = tl.zeros((MARKS, STRIP), tl.float32)
        masses = tl.zeros((MARKS, STRIP), tl.float32)
        for first in range(0, CHUNK, STRIP):
            strip = chunk * CHUNK + first + tl.arange(0, STRIP)
            part = tl.load(start + strip, mask=strip < vocab, other=float("-inf")).to(tl.float32)
            above = (part[None, :] >= marks[:, None]).to(tl.float32)
            counts += above
            masses += above * tl.exp2((part - base) * scale)[None, :]
        bins = chunk * MARKS + mark + (CHUNKS + 4 * BLOCK_C)
        tl.store(ints + bins, tl.sum(counts, 1).to(tl.int32))
        tl.store(floats + bins + BLOCK_C * MARKS, tl.sum(masses, 1))


@jit
def _copy_bin(start, vocab, lower, upper, copied, copied_ids, GATHER: tl.constexpr):
    """Write a bin's logits and ids out of the row, one behind the other by ascending id."""
    tl.debug_barrier()  # everyone has read the bin that was here before
    base = 0
    offsets = tl.arange(0, GATHER)
    ahead = tl.load(start + offsets, mask=offsets < vocab, other=float("-inf"))
    for first in range(0, vocab, GATHER):
        x = ahead.to(tl.float32)
        ids = first + offsets
        ahead = tl.load(start + ids + GATHER, mask=ids + GATHER < vocab, other=float("-inf"))
        inside = (_image(x) >= lower) & (_image(x) < upper)
        slot = base + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(copied + slot, x, mask=inside)
        tl.store(copied_ids + slot, ids, mask=inside)
        base += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()


@jit
def _bin_logits(offsets, copied, size, is_copied, start, vocab, lower, upper):
    """Logits of a bin, -inf where there is none: from the copy, or picked out of the row."""
    if is_copied:
        x = tl.load(copied + offsets, mask=offsets < size, other=float("-inf"))
    else:
        x = tl.load(start + offsets, mask=offsets < vocab, other=float("-inf")).to(tl.float32)
        image = _image(x)
        x = tl.where((image >= lower) & (image < upper), x, float("-inf"))
    return x


@jit
def _largest_reaching(
    goal, low, high, by_mass, top, scale, copied, size, is_copied, start, vocab, lower, upper, TILE: tl.constexpr
):
    """The largest image in low .. high - 1 at or above which a bin's tokens, or their mass, come to ``goal``."""
    span = tl.where(is_copied, size, vocab)
    while high - low > 1:
        step = (high - low + PROBES) // (PROBES + 1)
        probes = low + step * (1 + tl.arange(0, PROBES))
        bounds = _number(tl.minimum(probes, high).to(tl.int32))
        reach = tl.zeros((PROBES,), tl.float64)
        for first in range(0, span, TILE):
            x = _bin_logits(first + tl.arange(0, TILE), copied, size, is_copied, start, vocab, lower, upper)
            weights = tl.where(by_mass, tl.exp2((x - top) * scale), 1.0)
            above = (x[None, :] >= bounds[:, None]).to(tl.float32)
            reach += tl.sum(above * weights[None, :], 1).to(tl.float64)
        low += step * tl.sum(((reach >= goal) & (probes < high)).to(tl.int64), 0)
        high = tl.minimum(high, low + step)
    return low


@jit
def _tally(edge, top, scale, copied, size, is_copied, start, vocab, lower, upper, TILE: tl.constexpr):
    """Of a bin: how many tokens lie above ``edge``, their mass, and how many equal it. float64."""
    beyond = 0.0 * top.to(tl.float64)
    mass = beyond
    equals = beyond
    for first in range(0, tl.where(is_copied, size, vocab), TILE):
        x = _bin_logits(first + tl.arange(0, TILE), copied, size, is_copied, start, vocab, lower, upper)
        beyond += tl.sum((x > edge).to(tl.float32), 0)
        mass += tl.sum(tl.where(x > edge, tl.exp2((x - top) * scale), 0.0), 0)
        equals += tl.sum((x == edge).to(tl.float32), 0)
    return beyond, mass, equals


@jit
def _id_of_equal(edge, rank, copied, copied_ids, size, is_copied, start, vocab, lower, upper, TILE: tl.constexpr):
    """The id of the ``rank``-th token, from 1, of a bin's tokens equal to ``edge``."""
    seen = 0
    found = -1
    for first in range(0, tl.where(is_copied, size, vocab), TILE):
        ids = first + tl.arange(0, TILE)
        equal = _bin_logits(ids, copied, size, is_copied, start, vocab, lower, upper) == edge
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
    place = chunk[:, None] * MARKS + mark[None, :] + (CHUNKS + 4 * BLOCK_C)
    counts = tl.sum(tl.load(ints + place, mask=real, other=0), 0).to(tl.float64)
    masses = tl.load(floats + place + BLOCK_C * MARKS, mask=real, other=0.0).to(tl.float64)
    masses = tl.sum(masses * tl.exp2((peaks - top) * scale).to(tl.float64)[:, None], 0)
    budget = _pick(masses, MARKS - 1)
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
        if tl.where(by_mass, p < 1, (k > 0) & (goal < _pick(counts, MARKS - 1))):
            sizes = tl.where(by_mass, masses, counts)
            here = tl.minimum(tl.sum((sizes < goal).to(tl.int32), 0), last_bin)
            last_bin = here
            if here != held:
                held = here
                lower = _pick(marks, here)
                upper = tl.where(here > 0, _pick(marks, here - 1), _image(top) + 1)
                size = (_pick(counts, here) - _pick(counts, here - 1)).to(tl.int32)
                if size <= capacity:
                    _copy_bin(start, vocab, lower, upper, copied, copied_ids, GATHER)
            fits = size <= capacity
            goal -= _pick(sizes, here - 1)
            low = tl.maximum(lower, lowest).to(tl.int64)
            low = _largest_reaching(
                goal, low, upper.to(tl.int64), by_mass, top, scale, copied, size, fits, start, vocab, lower, upper, TILE
            )
            edge = _number(low.to(tl.int32))
            beyond, mass, equals = _tally(edge, top, scale, copied, size, fits, start, vocab, lower, upper, TILE)
            weight = tl.exp2((edge - top) * scale).to(tl.float64)
            if by_mass:
                wanted = tl.maximum(tl.where(weight > 0, tl.ceil((goal - mass) / weight), equals), 1.0)
                room = tl.where(low == lowest, tl.minimum(wanted, room), wanted)
            else:
                room = goal - beyond
                budget = _pick(masses, here - 1) + mass + room * weight
            lowest = low.to(tl.int32)
    last = LARGEST_INT
    if room < equals:
        fits = size <= capacity
        edge = _number(lowest)
        last = _id_of_equal(edge, room, copied, copied_ids, size, fits, start, vocab, lower, upper, TILE)
    return lowest, last


@jit
def _lowest_likely(least, lowest, top, warmth):
    """The lowest image, from ``lowest`` on, whose logit min-p keeps. The test is the twin's, float64."""
    floor = tl.log(least)
    failing = (lowest - 1).to(tl.int64)
    passing = _image(top).to(tl.int64)
    while passing - failing > 1:
        step = (passing - failing + 255) // 256
        probes = failing + step * (1 + tl.arange(0, 256))
        x = _number(tl.minimum(probes, passing).to(tl.int32)).to(tl.float64)
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
    vocab,
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
    total = tl.sum(sums.to(tl.float64) * tl.exp((peaks - top).to(tl.float64)), 0)
    tl.store(floats + TOP, top)
    tl.store(floats + LOG_SUM, tl.log(total).to(tl.float32))
    tl.store(ints + LIKELIEST, tl.min(tl.where(peaks == top, peak_ids, vocab), 0))
    warmth = tl.load(temperature + row).to(tl.float64)
    k = tl.load(top_k + row)
    # NaN compares false: a row of no use is not drawn from.
    drawn = _is_drawn(warmth, k) & (total < float("inf")) & (top > float("-inf")) & (top < float("inf"))
    tl.store(ints + DRAWN, drawn.to(tl.int32))
    if drawn:
        p = tl.load(top_p + row).to(tl.float64)
        lowest = LOWEST_FINITE
        last = LARGEST_INT
        if _is_ranked(k, p, vocab):
            scale = _log2_scale(warmth)
            lowest, last = _keep_ranked(
                k, p, scale, start, vocab, peaks, top, ints, floats, copied, copied_ids, capacity, BLOCK_C, GATHER, TILE
            )
        least = tl.load(min_p + row).to(tl.float64)
        if least > 0:
            likely = _lowest_likely(least, lowest, top, warmth)
            last = tl.where(likely > lowest, LARGEST_INT, last)
            lowest = likely
        tl.store(ints + LOWEST, lowest)
        tl.store(ints + LAST, last)


@jit(do_not_specialize=["vocab", "margin"])
def draw_kernel(
    logits,
    row_stride,
    temperature,
    seed,
    position,
    ints,
    floats,
    margin,
    vocab,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (rows, chunks). The id of the chunk's winner, -1 if it has none.

    Scores are fp32; where several lie within ``margin`` of the best, float64 decides.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ints += row * WIDTH
    floats += row * WIDTH
    winner = -1
    if tl.load(ints + DRAWN) == 1:
        lowest = tl.load(ints + LOWEST)
        if _image(tl.load(floats + CHUNKS + chunk)) >= lowest:
            last = tl.load(ints + LAST)
            top = tl.load(floats + TOP)
            warmth = tl.load(temperature + row).to(tl.float64)
            ids = chunk * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            kept = (_image(x) > lowest) | ((_image(x) == lowest) & (ids <= last))
            block = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
            w0, w1, w2, w3 = _random_words(tl.load(seed + row), tl.load(position + row), block)
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            scaled = (x - top) * tl.minimum(1.0 / warmth, 1e30).to(tl.float32)
            score = tl.where(kept, scaled + _quick_noise(words), float("-inf"))
            best = tl.max(score, 0)
            # The likeliest token is always kept and scores above -3.2, and noise stays below 22.9: lower is lost.
            if best > -30.0:
                winner = tl.min(tl.where(score == best, ids, vocab), 0)
                if tl.sum((score >= best - margin).to(tl.int32), 0) > 1:
                    record = float("-inf") + 0 * warmth
                    for first in range(0, CHUNK, STRIP):
                        strip = chunk * CHUNK + first + tl.arange(0, STRIP)
                        part = tl.load(logits + row * row_stride + strip, mask=strip < vocab, other=float("-inf"))
                        part = part.to(tl.float32)
                        stays = (_image(part) > lowest) | ((_image(part) == lowest) & (strip <= last))
                        word = _random_word(tl.load(seed + row), tl.load(position + row), strip)
                        exact = tl.where(stays, _exact_score(part, top, warmth, word), float("-inf"))
                        highest = tl.max(exact, 0)
                        if highest > record:
                            record = highest
                            winner = tl.min(tl.where(exact == highest, strip, vocab), 0)
    tl.store(ints + CHUNKS + 3 * BLOCK_C + chunk, winner)


@jit(do_not_specialize=["vocab"])
def finish_kernel(
    logits,
    row_stride,
    temperature,
    seed,
    position,
    ints,
    floats,
    tokens,
    logprobs,
    vocab,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    ints += row * WIDTH
    floats += row * WIDTH
    top = tl.load(floats + TOP)
    token = tl.load(ints + LIKELIEST)
    if tl.load(ints + DRAWN) == 1:
        chunk = tl.arange(0, BLOCK_C)
        ids = tl.load(ints + CHUNKS + 3 * BLOCK_C + chunk, mask=chunk < tl.cdiv(vocab, CHUNK), other=-1)
        x = tl.load(start + ids, mask=ids >= 0, other=float("-inf")).to(tl.float32)
        word = _random_word(tl.load(seed + row), tl.load(position + row), ids)
        score = _exact_score(x, top, tl.load(temperature + row), word)
        score = tl.where(ids >= 0, score, float("-inf"))
        winner = tl.min(tl.where((ids >= 0) & (score == tl.max(score, 0)), ids, vocab), 0)
        token = tl.where(winner < vocab, winner, token)
    token = tl.where(token < vocab, token, 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(start + token).to(tl.float32) - top - tl.load(floats + LOG_SUM))

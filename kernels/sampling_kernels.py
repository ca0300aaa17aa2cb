"""The Triton kernels of ``kernels.sampling``, which says what they compute and launches them.

Five launches, sized by shapes alone. What a row needs is decided on the device by its own parameters:

1. ``splitters_kernel``, a block a row: 16 marks that cut a filtered row's logits into bins of a few thousand;
2. ``chunk_kernel``, a block for each 4096 tokens: maximum, sum of exponentials and, in a filtered row, how many
   tokens and how much mass lie at or above each mark;
3. ``sampling_threshold.threshold_kernel``, a block a row: the lowest logit that stays. It copies the bin that holds
   the threshold out of the row and narrows it down there;
4. ``draw_kernel``, a block for each 4096 tokens: the chunk's winner among what stays;
5. ``finish_kernel``, a block a row: the winner of the winners, and its log probability.

All filters keep a head of the row's order (logit descending, id ascending), so what is kept is a threshold and an id:
logits above the threshold, and those equal to it up to that id. Logits are compared through ``image_of``.

A row whose logits were changed (``kernels.logit_changes``) is drawn from the changed ones. Its sum of exponentials is
the raw row's, and so are its marks, which are as right.

Chunks and tiles depend on the vocabulary alone, and every sum runs in a fixed order, so a row's result does not depend
on the batch around it. Results go from launch to launch through a workspace, ``WIDTH`` words a row: ``ints`` and
``floats`` are two views of it.
"""

from __future__ import annotations

from kernels.dispatch import jit, tl
from kernels.sampling_row import (
    BARRED,
    CHUNK,
    CHUNKS,
    DRAWN,
    LAST,
    LIKELIEST,
    LOG_SUM,
    LOWEST,
    LOWEST_FINITE,
    MARGIN,
    MARKS,
    RAW_TOP,
    SAMPLE,
    STRIP,
    TOP,
    changed_row,
    image_of,
    is_drawn,
    is_ranked,
    log2_scale,
    logits_at,
    number_of,
)


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
def quick_noise(word):
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
    if is_drawn(tl.load(temperature + row), k) & is_ranked(k, tl.load(top_p + row), vocab):
        start = logits + row * row_stride
        index = tl.arange(0, SAMPLE)
        image = image_of(tl.load(start + (index.to(tl.int64) * vocab // SAMPLE)).to(tl.float32))
        rank = tl.zeros((SAMPLE,), tl.int32)
        for first in range(0, SAMPLE, 64):
            other = first + tl.arange(0, 64)
            rival = image_of(tl.load(start + (other.to(tl.int64) * vocab // SAMPLE)).to(tl.float32))
            sooner = (rival[:, None] == image[None, :]) & (other[:, None] < index[None, :])
            rank += tl.sum(((rival[:, None] > image[None, :]) | sooner).to(tl.int32), 0)
        mark = tl.arange(0, MARKS)
        wanted = tl.where(mark < 6, (1 << mark) - 1, 24 * mark - 89)
        found = tl.max(tl.where(rank[None, :] == wanted[:, None], image[None, :], BARRED), 1)
        found = tl.where(mark == MARKS - 1, LOWEST_FINITE, tl.maximum(found, LOWEST_FINITE))
        tl.store(ints + row * WIDTH + mark, found)


@jit
def _note_largest(x, ids, chunk, ints, floats, vocab, BLOCK_C: tl.constexpr):
    """Leave a chunk's largest logit and its id; returns what the chunk's masses are relative to."""
    top = tl.max(x, 0)
    place = chunk + CHUNKS
    tl.store(floats + place, top)
    tl.store(ints + place + BLOCK_C, tl.min(tl.where(x == top, ids, vocab), 0))
    return tl.where(top == float("-inf"), 0.0, top)


@jit
def _tally_chunk(start, base, chunk, scale, ints, floats, vocab, BLOCK_C: tl.constexpr):
    """Leave how many tokens and how much mass of a chunk lie at or above each mark."""
    mark = tl.arange(0, MARKS)
    marks = number_of(tl.load(ints + mark))
    counts = tl.zeros((MARKS, STRIP), tl.float32)
    masses = tl.zeros((MARKS, STRIP), tl.float32)
    for first in range(0, CHUNK, STRIP):
        strip = chunk * CHUNK + first + tl.arange(0, STRIP)
        part = tl.load(start + strip, mask=strip < vocab, other=float("-inf")).to(tl.float32)
        above = (part[None, :] >= marks[:, None]).to(tl.float32)
        counts += above
        masses += above * tl.exp2((part - base) * scale)[None, :]
    bins = chunk * MARKS + mark + (CHUNKS + 5 * BLOCK_C)
    tl.store(ints + bins, tl.sum(counts, 1).to(tl.int32))
    tl.store(floats + bins + BLOCK_C * MARKS, tl.sum(masses, 1))


# Here and in draw_kernel a changed row takes a branch of its own, loads and all: these have another type and alignment,
# so another layout, and a plain row would pay for moving between the two.
@jit(do_not_specialize=["vocab"])
def chunk_kernel(
    logits,
    row_stride,
    temperature,
    top_k,
    top_p,
    ints,
    floats,
    places,
    changed,
    vocab,
    CHANGED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (rows, chunks). Masses are relative to the chunk's largest logit. The sum is of the raw logits."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = logits + row * row_stride
    is_changed, changed = changed_row(places, changed, row, vocab, CHANGED)
    ints += row * WIDTH
    floats += row * WIDTH
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(start + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(floats + chunk + CHUNKS + 4 * BLOCK_C, top)
    raw_base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(floats + chunk + CHUNKS + 2 * BLOCK_C, tl.sum(tl.exp(x - raw_base), 0))
    warmth = tl.load(temperature + row)
    k = tl.load(top_k + row)
    ranked = is_drawn(warmth, k) & is_ranked(k, tl.load(top_p + row), vocab)
    scale = log2_scale(warmth)
    if is_changed:
        y = tl.load(changed + ids, mask=ids < vocab, other=float("-inf"))
        base = _note_largest(y, ids, chunk, ints, floats, vocab, BLOCK_C)
        if ranked:
            _tally_chunk(changed, base, chunk, scale, ints, floats, vocab, BLOCK_C)
    else:
        base = _note_largest(x, ids, chunk, ints, floats, vocab, BLOCK_C)
        if ranked:
            _tally_chunk(start, base, chunk, scale, ints, floats, vocab, BLOCK_C)


@jit
def _winner(start, chunk, top, lowest, last, warmth, seed, position, vocab):
    """The id of the chunk's winner among the logits from ``start`` on, -1 if it has none."""
    winner = -1
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(start + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    kept = (image_of(x) > lowest) | ((image_of(x) == lowest) & (ids <= last))
    block = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    w0, w1, w2, w3 = _random_words(seed, position, block)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    scaled = (x - top) * tl.minimum(1.0 / warmth, 1e30).to(tl.float32)
    score = tl.where(kept, scaled + quick_noise(words), float("-inf"))
    best = tl.max(score, 0)
    # The likeliest token is always kept and scores above -3.2, and noise stays below 22.9: lower is lost.
    if best > -30.0:
        winner = tl.min(tl.where(score == best, ids, vocab), 0)
        if tl.sum((score >= best - MARGIN).to(tl.int32), 0) > 1:
            record = float("-inf") + 0 * warmth
            for first in range(0, CHUNK, STRIP):
                strip = chunk * CHUNK + first + tl.arange(0, STRIP)
                part = tl.load(start + strip, mask=strip < vocab, other=float("-inf"))
                part = part.to(tl.float32)
                stays = (image_of(part) > lowest) | ((image_of(part) == lowest) & (strip <= last))
                word = _random_word(seed, position, strip)
                exact = tl.where(stays, _exact_score(part, top, warmth, word), float("-inf"))
                highest = tl.max(exact, 0)
                if highest > record:
                    record = highest
                    winner = tl.min(tl.where(exact == highest, strip, vocab), 0)
    return winner


@jit(do_not_specialize=["vocab"])
def draw_kernel(
    logits,
    row_stride,
    temperature,
    seed,
    position,
    ints,
    floats,
    places,
    changed,
    vocab,
    CHANGED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (rows, chunks). The id of the chunk's winner, -1 if it has none.

    Scores are fp32; where several lie within MARGIN of the best, float64 decides.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ints += row * WIDTH
    floats += row * WIDTH
    winner = -1
    if tl.load(ints + DRAWN) == 1:
        lowest = tl.load(ints + LOWEST)
        if image_of(tl.load(floats + CHUNKS + chunk)) >= lowest:
            last = tl.load(ints + LAST)
            top = tl.load(floats + TOP)
            warmth = tl.load(temperature + row).to(tl.float64)
            key = tl.load(seed + row)
            counter = tl.load(position + row)
            is_changed, changed = changed_row(places, changed, row, vocab, CHANGED)
            if is_changed:
                winner = _winner(changed, chunk, top, lowest, last, warmth, key, counter, vocab)
            else:
                start = logits + row * row_stride
                winner = _winner(start, chunk, top, lowest, last, warmth, key, counter, vocab)
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
    places,
    changed,
    counts,
    vocab,
    CHANGED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (rows,). Counts the token where the row's are counted."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    is_changed, changed = changed_row(places, changed, row, vocab, CHANGED)
    ints += row * WIDTH
    floats += row * WIDTH
    top = tl.load(floats + TOP)
    token = tl.load(ints + LIKELIEST)
    if tl.load(ints + DRAWN) == 1:
        chunk = tl.arange(0, BLOCK_C)
        ids = tl.load(ints + CHUNKS + 3 * BLOCK_C + chunk, mask=chunk < tl.cdiv(vocab, CHUNK), other=-1)
        x = logits_at(start, changed, is_changed, ids, ids >= 0)
        word = _random_word(tl.load(seed + row), tl.load(position + row), ids)
        score = _exact_score(x, top, tl.load(temperature + row), word)
        score = tl.where(ids >= 0, score, float("-inf"))
        winner = tl.min(tl.where((ids >= 0) & (score == tl.max(score, 0)), ids, vocab), 0)
        token = tl.where(winner < vocab, winner, token)
    token = tl.where(token < vocab, token, 0)
    tl.store(tokens + row, token.to(tl.int64))
    logprob = tl.load(start + token).to(tl.float32) - tl.load(floats + RAW_TOP) - tl.load(floats + LOG_SUM)
    tl.store(logprobs + row, tl.where(top == float("-inf"), float("nan"), logprob))
    if is_changed:
        count = counts + (tl.load(places + row).to(tl.int64) * vocab + token)
        tl.store(count, tl.load(count) + 2)

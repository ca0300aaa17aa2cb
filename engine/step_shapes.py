"""The shapes that steps are padded to, and which of them are captured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler import StepPlan

_LADDER = (128, 256, 384, 512, 768)  # then doubled from 512 and 768: padded by a third of the tokens at most
_PROMPTS = 8  # chunks that every captured step with prompts has room for; more where they have 16 tokens each


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step is padded to: decode rows, then prefill chunks with so many tokens together."""

    decode_rows: int
    prefill_rows: int
    prefill_tokens: int

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    @property
    def tokens(self) -> int:
        return self.decode_rows + self.prefill_tokens

    def holds(self, decoding: int, prompts: int, tokens: int) -> bool:
        """Whether so many decoding rows, and chunks of prompts with so many tokens together, fit."""
        return decoding <= self.decode_rows and prompts <= self.prefill_rows and tokens <= self.prefill_tokens

    def places(self, plan: StepPlan) -> list[int]:
        """The row of the padded step that each row of ``plan`` becomes."""
        prompts = len(plan.rows) - plan.num_decode
        return [*range(plan.num_decode), *range(self.decode_rows, self.decode_rows + prompts)]


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that decode steps are captured for: padded by less than 8 rows, or less than a fifth."""
    buckets = [rows for rows in (1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16)) if rows < max_rows]
    return [*buckets, max_rows]


def prefill_buckets(max_batch_tokens: int) -> list[int]:
    """Numbers of prompt tokens that steps are captured for: a step is padded by less than 128, or less than half."""
    sizes: list[int] = [*_LADDER]
    while sizes[-1] < max_batch_tokens:
        sizes.append(2 * sizes[-2])
    return [*(size for size in sizes if size < max_batch_tokens), max_batch_tokens]


def step_shapes(max_rows: int, prefill_tokens: Sequence[int], max_mixed_tokens: int) -> list[StepShape]:
    """Decode steps of :func:`row_buckets`, and steps with prompts of so many tokens together beside no, few or many
    decoding rows. The largest first.

    More than ``max_mixed_tokens`` tokens go beside as few rows as the scheduler lets them (``Scheduler``).
    """
    shapes = [StepShape(rows, 0, 0) for rows in row_buckets(max_rows)]
    beside = sorted({0, *(rows for rows in (16, 32) if rows < max_rows), max_rows})
    smaller = 0
    for tokens in sorted(prefill_tokens):
        # So many prompt tokens need ``waiting >= smaller / max_mixed_tokens * decoding`` rows, max_rows in all.
        many = smaller >= max_mixed_tokens
        most = max_rows * max_mixed_tokens // (max_mixed_tokens + smaller) if many else max_rows
        last = beside[bisect_left(beside, most)]
        chunks = min(max(_PROMPTS, tokens // 16), max_rows)
        shapes += [StepShape(rows, chunks, tokens) for rows in beside if rows <= last]
        smaller = tokens
    return sorted(shapes, key=lambda shape: shape.tokens, reverse=True)

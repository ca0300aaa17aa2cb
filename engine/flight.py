"""A step that was launched and whose draws are on their way to the host."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.errors import AdapterRefused
from engine.host_copy import to_host
from engine.request import GenerationFailed
from engine.scheduler import PlannedRow
from engine.sequence import Sequence
from engine.step import Drawn
from kernels.sampling import log_probs


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token; ``token_id`` is None when the row's logits held NaN or +inf, or nothing but -inf.

    logprob and top (token id, logprob), likeliest first, are set when the request asked for them.
    """

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Flight:
    """The draws of one step. Made right after its launch, before the next one's; may be read long after."""

    def __init__(self, rows: Many[PlannedRow], drawn: Drawn, undrawn: Many[Sequence] = ()) -> None:
        """rows: those that draw a token, in the order of ``drawn.places``. undrawn: those that
        draw none and are done with this step. Nothing waits for the device."""
        self.rows, self.undrawn, self._places = rows, undrawn, drawn.places
        asked = [row.sequence.request.sampling.logprobs for row in rows]
        self._wanted = {index: count for index, count in enumerate(asked) if count is not None}
        self._tokens = to_host(torch.where(drawn.logprobs.isnan(), -1, drawn.ids))
        self._logprobs: tuple[Tensor, ...] = ()
        if self._wanted:
            index = torch.tensor([drawn.places[row] for row in self._wanted], dtype=torch.int64)
            index = index.to(drawn.ids.device, non_blocking=True)
            logits, ids = drawn.logits.index_select(0, index), drawn.ids.index_select(0, index)
            self._logprobs = tuple(map(to_host, log_probs(logits, ids, max(self._wanted.values()))))
        self._done: torch.cuda.Event | None = None
        if drawn.ids.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[SampledToken]:
        """The token of each row; waits for the step."""
        if self._done is not None:
            self._done.synchronize()
        logprobs: dict[int, float] = {}
        tops: dict[int, tuple[tuple[int, float], ...]] = {}
        if self._wanted:
            for (row, count), value, ids, values in zip(
                self._wanted.items(), *(tensor.tolist() for tensor in self._logprobs), strict=True
            ):
                logprobs[row], tops[row] = value, tuple(zip(ids[:count], values[:count], strict=True))
        tokens = self._tokens.tolist()
        return [
            SampledToken(tokens[place] if tokens[place] >= 0 else None, logprobs.get(row), tops.get(row, ()))
            for row, place in enumerate(self._places)
        ]


def not_finite(sequence: Sequence) -> Exception:
    """Why a sequence ends whose drawn token is None, or of whose prompt something else was read."""
    what = f"logits of token {sequence.known}" if sequence.request.pooling is None else "hidden states"
    where = f"the {what} are not finite"
    if sequence.mask_row >= 0:
        where += ", or none of those that its grammar and min_tokens allow is"
    if sequence.request.adapter is None:
        return GenerationFailed(f"{where}: the base model overflows in this dtype; try bfloat16 or float32")
    return AdapterRefused(
        sequence.request.adapter,
        f"{where}: its weights make the model overflow; check its scale and how it was trained",
    )

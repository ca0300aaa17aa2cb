"""Runs one planned step on the device and brings the drawn tokens back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_store.slots import SlotPool
from engine.batch import step_inputs
from engine.decode_graphs import DecodeGraphs
from engine.model import DecoderModel
from engine.scheduler import PlannedRow, StepPlan
from engine.step import Drawn, KVCache, LoraState
from kernels.lora_group import packed_rank
from kernels.sampling import log_probs

_Logprobs = tuple[float | None, tuple[tuple[int, float], ...]]
_NO_LOGPROBS: _Logprobs = (None, ())


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token; ``token_id`` is None when the row's logits held NaN or +inf, or nothing but -inf.

    logprob and top (token id, logprob), likeliest first, are set when the request asked for them.
    """

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Runner:
    """The model, its KV cache and the adapters' slots. One thread only."""

    def __init__(self, model: DecoderModel, kv: KVCache, slots: SlotPool | None) -> None:
        self.model = model
        self.kv = kv
        self.slots = slots
        self.graphs: DecodeGraphs | None = None
        self.lora: LoraState | None = None
        if slots is not None:
            groups = tuple(slots.layout.lora_groups(layer) for layer in range(slots.layout.num_layers))
            self.lora = LoraState(slots.arena, slots.slot_table, groups, packed_rank(slots.max_rank))

    def run(self, plan: StepPlan, *, always_lora: bool = False) -> list[SampledToken]:
        """One forward pass. A token for each row of the plan that ``samples``, in its order; waits for the device.

        always_lora: launch the LoRA kernels even when no row has an adapter (to compile them).
        """
        graphs = self.graphs
        drawn = graphs.run(plan) if graphs is not None and graphs.takes(plan) else self._launch(plan, always_lora)
        if self.slots is not None:
            self.slots.step_done()
        rows = [row for row in plan.rows if row.samples]
        if rows:
            return _read(drawn, rows)
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        return []

    def capture(self, buckets: Sequence[int], max_pages: int) -> None:
        """Decode through graphs from now on. To be called again when ``kv`` is replaced."""
        self.graphs = DecodeGraphs(self.model, self.kv, self.lora, buckets, max_pages)

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.model.device)
        for cache in (*self.kv.keys, *self.kv.values):
            cache.index_fill_(0, index, math.nan)

    def _launch(self, plan: StepPlan, always_lora: bool) -> Drawn:
        inputs, sampling = step_inputs(plan, self.kv.page_size, self.model.device)
        if always_lora and self.lora is not None:
            inputs = replace(inputs, num_lora_rows=inputs.num_decode_rows, has_lora=True)
        logits = self.model.forward(inputs, self.kv, self.lora)
        return Drawn(*sampling.draw(logits), logits)


def _read(drawn: Drawn, rows: Sequence[PlannedRow]) -> list[SampledToken]:
    asked = {index: row.sequence.request.sampling.logprobs for index, row in enumerate(rows)}
    wanted = {index: count for index, count in asked.items() if count is not None}
    logprobs = _logprobs(drawn.logits, drawn.ids, wanted) if wanted else {}
    tokens: list[int] = torch.where(drawn.logprobs.isnan(), -1, drawn.ids).tolist()
    return [
        SampledToken(token if token >= 0 else None, *logprobs.get(index, _NO_LOGPROBS))
        for index, token in enumerate(tokens)
    ]


def _logprobs(logits: Tensor, ids: Tensor, wanted: Mapping[int, int]) -> dict[int, _Logprobs]:
    """Raw log probabilities of the rows in ``wanted``, which maps a row to how many of the likeliest it asks for."""
    index = torch.tensor(list(wanted), dtype=torch.int64).to(logits.device, non_blocking=True)
    chosen, top_ids, top = log_probs(logits.index_select(0, index), ids.index_select(0, index), max(wanted.values()))
    return {
        row: (value, tuple(zip(likeliest[:count], values[:count], strict=True)))
        for (row, count), value, likeliest, values in zip(
            wanted.items(), chosen.tolist(), top_ids.tolist(), top.tolist(), strict=True
        )
    }

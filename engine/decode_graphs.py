"""Decode steps as CUDA graphs: one for each of some numbers of rows, with and without LoRA, on fixed buffers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.batch import SamplingInputs, decode_arrays, with_drawn
from engine.model import DecoderModel
from engine.scheduler import StepPlan
from engine.static_inputs import StaticInputs
from engine.step import Drawn, KVCache, LoraState, StepInputs


@dataclass(frozen=True, slots=True)
class _Step:
    """One captured step. graph: None on a CPU, where the step is computed anew on the same buffers."""

    inputs: StepInputs
    sampling: SamplingInputs
    ids: Tensor
    logprobs: Tensor
    graph: torch.cuda.CUDAGraph | None


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that steps are captured for: a step is padded by less than 8 rows, or less than a fifth."""
    buckets = [rows for rows in (1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16)) if rows < max_rows]
    return [*buckets, max_rows]


def _lora_levels(rows: int) -> list[int]:
    """First rows of a step that LoRA is launched for: none, few, or all. Rows with adapters stand first."""
    return sorted({0, min(8, rows), rows})


class DecodeGraphs:
    """Steps in which every row decodes one token, padded to the next captured number of rows.

    A padding row has context length 0, KV slot -1 and no adapter; it writes nothing and its token is dropped. A row's
    result is the same bit for bit in every step of one bucket, whatever the rows beside it. Adapters change slots and
    slots change contents under the graphs: both are read from the slot table at replay.

    Not thread-safe. To be made anew when the KV cache is.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        lora: LoraState | None,
        drawn: Tensor,
        buckets: Sequence[int],
        max_pages: int,
    ) -> None:
        """Captures every bucket on a GPU.

        drawn: (buckets' largest or more,) int64: every step leaves the ids it drew there, and reads those of the step
        before where the host does not know them. max_pages: KV pages of the longest row.
        """
        self.model, self.kv, self.lora, self._drawn = model, kv, lora, drawn
        self.buckets = sorted(buckets)
        rows = self.buckets[-1]
        self._logits = torch.empty((rows, model.spec.vocab_size), dtype=model.dtype, device=model.device)
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._static: dict[int, StaticInputs] = {}
        self._steps: dict[tuple[int, int], _Step] = {}
        for rows in reversed(self.buckets):  # the largest first: the others then fit into its memory
            self._static[rows] = StaticInputs(decode_arrays((), rows, max_pages, kv.page_size), model.device)
            for lora_rows in _lora_levels(rows) if lora is not None else (0,):
                self._steps[rows, lora_rows] = self._capture(rows, lora_rows)

    def takes(self, plan: StepPlan) -> bool:
        """Whether every row of ``plan`` decodes, and there are no more than the largest bucket."""
        return len(plan.rows) == plan.num_decode <= self.buckets[-1]

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Drawn:
        """Launch the step; nothing waits for the device."""
        count = len(plan.rows)
        rows = self.buckets[bisect_left(self.buckets, count)]
        static = self._static[rows]
        static.fill(decode_arrays(plan.rows, rows, static.views["page_table"].shape[1], self.kv.page_size))
        with_lora = max((number for number, row in enumerate(plan.rows, 1) if row.sequence.lora_index >= 0), default=0)
        step = self._steps[rows, next(level for level in _lora_levels(rows) if level >= with_lora)]
        if step.graph is None:
            ids, logprobs = self._step(static, step.inputs, step.sampling)
            return Drawn(ids[:count], logprobs[:count], self._logits[:count])
        step.graph.replay()
        return Drawn(step.ids[:count], step.logprobs[:count], self._logits[:count])

    def _capture(self, rows: int, lora_rows: int) -> _Step:
        static = self._static[rows]
        views = static.views
        sampling = SamplingInputs(**{name: views[name] for name in SamplingInputs.names()})
        others = SamplingInputs.names() | {"awaited"}
        inputs = StepInputs(
            **{name: view for name, view in views.items() if name not in others},
            num_decode_rows=rows,
            num_lora_rows=lora_rows,
            max_query_len=0,
            has_lora=lora_rows > 0,
        )
        ids, logprobs = self._step(static, inputs, sampling)  # compiles, and allocates what lasts
        if self.model.device.type != "cuda":
            return _Step(inputs, sampling, ids, logprobs, None)
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            ids, logprobs = self._step(static, inputs, sampling)
        return _Step(inputs, sampling, ids, logprobs, graph)

    def _step(self, static: StaticInputs, inputs: StepInputs, sampling: SamplingInputs) -> tuple[Tensor, Tensor]:
        rows = inputs.num_decode_rows
        token_ids = with_drawn(inputs.token_ids, static.views["awaited"], self._drawn)
        self.model.forward(replace(inputs, token_ids=token_ids), self.kv, self.lora, out=self._logits[:rows])
        ids, logprobs = sampling.draw(self._logits[:rows])
        self._drawn[:rows].copy_(ids)
        return ids, logprobs

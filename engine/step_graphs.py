"""Steps as CUDA graphs: one for each of some shapes, with and without LoRA, replayed on fixed buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.batch import SamplingInputs, padded_arrays, with_drawn
from engine.model import DecoderModel
from engine.scheduler import StepPlan
from engine.static_inputs import StaticInputs
from engine.step import Drawn, KVCache, LoraState, StepInputs
from engine.step_shapes import StepShape
from kernels.logit_changes import ChangeState


@dataclass(frozen=True, slots=True)
class _Step:
    """One captured step. graph: None on a CPU, where the step is computed anew on the same buffers."""

    inputs: StepInputs
    sampling: SamplingInputs
    ids: Tensor
    logprobs: Tensor
    graph: torch.cuda.CUDAGraph | None


def _lora_levels(shape: StepShape) -> list[int]:
    """First decode rows that LoRA is launched for. Rows with adapters stand first; -1 is no LoRA for any row."""
    if shape.prefill_rows:
        return [-1, shape.decode_rows]
    return sorted({-1, min(8, shape.decode_rows), shape.decode_rows})


class StepGraphs:
    """Steps padded to captured shapes.

    A padding row has context length 0, KV slot -1 and no adapter; it writes nothing and its token is dropped. A row's
    result is the same bit for bit in every decode step of one shape, whatever the rows beside it. Adapters change slots
    and slots change contents under the graphs: both are read from the slot table at replay.

    Not thread-safe. To be made anew when the KV cache is.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        lora: LoraState | None,
        changes: ChangeState,
        drawn: Tensor,
        shapes: Sequence[StepShape],
        max_pages: int,
    ) -> None:
        """Captures every shape on a GPU.

        drawn: (most rows of a shape,) int64 or longer: every step leaves the ids it drew there, and reads those of the
        step before where the host does not know them. max_pages: KV pages of the longest row.
        """
        self.model, self.kv, self.lora, self.changes, self._drawn = model, kv, lora, changes, drawn
        self._shapes = sorted(shapes, key=lambda shape: (shape.prefill_tokens, shape.decode_rows))
        most = max(shape.rows for shape in shapes)
        self._logits = torch.empty((most, model.spec.vocab_size), dtype=model.dtype, device=model.device)
        self._hidden = model.new_hidden(max(shape.tokens for shape in shapes))
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._static: dict[StepShape, StaticInputs] = {}
        self._steps: dict[tuple[StepShape, int], _Step] = {}
        # The largest first: the others then fit into its memory.
        for shape in sorted(shapes, key=lambda shape: shape.tokens, reverse=True):
            arrays = padded_arrays(StepPlan((), 0), shape, max_pages, kv.page_size)
            self._static[shape] = StaticInputs(arrays, model.device)
            for level in _lora_levels(shape) if lora is not None else (-1,):
                self._steps[shape, level] = self._capture(shape, level)

    def __len__(self) -> int:
        """How many steps are captured."""
        return len(self._steps)

    def shape_of(self, plan: StepPlan) -> StepShape | None:
        """The captured shape that holds ``plan`` with the fewest prompt tokens; None when none does."""
        prompts = len(plan.rows) - plan.num_decode
        counts = (plan.num_decode, prompts, plan.num_tokens - plan.num_decode)
        alike = (shape for shape in self._shapes if (shape.prefill_rows > 0) == (prompts > 0))
        return next((shape for shape in alike if shape.holds(*counts)), None)

    @torch.inference_mode()
    def run(self, plan: StepPlan, shape: StepShape) -> Drawn:
        """Launch the step, ``shape`` being ``shape_of(plan)``; nothing waits for the device."""
        static = self._static[shape]
        static.fill(padded_arrays(plan, shape, static.views["page_table"].shape[1], self.kv.page_size))
        step = self._steps[shape, self._level(plan, shape)]
        places = [place for place, row in zip(shape.places(plan), plan.rows, strict=True) if row.samples]
        if step.graph is None:
            ids, logprobs = self._step(static, step.inputs, step.sampling)
        else:
            step.graph.replay()
            ids, logprobs = step.ids, step.logprobs
        return Drawn(ids, logprobs, self._logits[: shape.rows], self._hidden[shape.decode_rows :], places)

    def _level(self, plan: StepPlan, shape: StepShape) -> int:
        if not plan.has_lora:
            return -1
        decode = plan.num_lora_rows
        return next(level for level in _lora_levels(shape) if level >= decode)

    def _capture(self, shape: StepShape, level: int) -> _Step:
        static = self._static[shape]
        views = static.views
        sampling = SamplingInputs(**{name: views[name] for name in SamplingInputs.names()})
        others = SamplingInputs.names() | {"awaited"}
        inputs = StepInputs(
            **{name: view for name, view in views.items() if name not in others},
            num_decode_rows=shape.decode_rows,
            num_lora_rows=max(level, 0),
            max_query_len=shape.prefill_tokens,
            has_lora=level >= 0,
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
        rows = inputs.logit_tokens.shape[0]
        token_ids = with_drawn(inputs.token_ids, static.views["awaited"], self._drawn)
        inputs = replace(inputs, token_ids=token_ids)
        # Always, so that the others of a step are computed alike whether or not a row asks for them.
        hidden = self._hidden[: len(token_ids)]
        self.model.forward(inputs, self.kv, self.lora, out=self._logits[:rows], hidden=hidden)
        ids, logprobs = sampling.draw(self._logits[:rows], self.changes)
        self._drawn[:rows].copy_(ids)
        return ids, logprobs

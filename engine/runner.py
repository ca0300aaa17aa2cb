"""Launches planned steps on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import replace

import torch
from torch import Tensor

from adapter_store.slots import SlotPool
from engine.batch import step_inputs
from engine.changed_rows import ChangedRows
from engine.flight import Flight
from engine.model import DecoderModel
from engine.scheduler import StepPlan
from engine.sequence import Sequence
from engine.step import Drawn, KVCache, LoraState
from engine.step_graphs import StepGraphs
from engine.step_shapes import StepShape
from kernels.lora_group import packed_rank


class Runner:
    """The model, its KV cache and the adapters' slots. One thread only."""

    def __init__(
        self, model: DecoderModel, kv: KVCache, slots: SlotPool | None, max_rows: int, changed: ChangedRows
    ) -> None:
        """max_rows: most rows of one step, those that pad it among them. changed: places for rows that need one."""
        self.model = model
        self.kv = kv
        self.slots = slots
        self.changed = changed
        self.graphs: StepGraphs | None = None
        self.lora: LoraState | None = None
        self._drawn = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
        if slots is not None:
            groups = tuple(slots.layout.lora_groups(layer) for layer in range(slots.layout.num_layers))
            self.lora = LoraState(slots.arena, slots.slot_table, groups, packed_rank(slots.max_rank))

    def launch(self, plan: StepPlan, *, always_lora: bool = False) -> Flight:
        """Launch one step; nothing waits for the device. Its sequences are told (``Sequence.launched``).

        A token that the step launched before drew need not have been read.
        always_lora: launch the LoRA kernels even when no row has an adapter (to compile them).
        """
        rows = tuple(row for row in plan.rows if row.samples)
        self.changed.prepare(rows)
        shape = None if self.graphs is None else self.graphs.shape_of(plan)
        if self.graphs is not None and shape is not None:
            drawn = self.graphs.run(plan, shape)
        else:
            drawn = self._launch(plan, always_lora)
            self._drawn[: len(rows)].copy_(drawn.ids)
        if self.slots is not None:
            self.slots.step_done()
        flight = Flight(rows, drawn, _read_prompts(plan, drawn.hidden, self.model.lm_head))
        places = iter(drawn.places)
        for row in plan.rows:
            row.sequence.launched(row.end, next(places) if row.samples else None)
        return flight

    def capture(self, shapes: Many[StepShape], max_pages: int) -> None:
        """Run steps that fit into ``shapes`` through graphs from now on. To be called again when ``kv`` is replaced."""
        self.graphs = StepGraphs(self.model, self.kv, self.lora, self.changed.state, self._drawn, shapes, max_pages)

    def poison(self, pages: Many[int]) -> None:
        """Fill pages with NaN."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.model.device)
        for cache in (*self.kv.keys, *self.kv.values):
            cache.index_fill_(0, index, math.nan)

    def _launch(self, plan: StepPlan, always_lora: bool) -> Drawn:
        inputs, sampling = step_inputs(plan, self.kv.page_size, self.model.device, self._drawn)
        if always_lora and self.lora is not None:
            inputs = replace(inputs, num_lora_rows=inputs.num_decode_rows, has_lora=True)
        hidden = self.model.new_hidden(plan.num_tokens)
        logits = self.model.forward(inputs, self.kv, self.lora, hidden=hidden)
        return Drawn(
            *sampling.draw(logits, self.changed.state), logits, hidden[plan.num_decode :], range(logits.shape[0])
        )


def _read_prompts(plan: StepPlan, hidden: Tensor, lm_head: Tensor) -> tuple[Sequence, ...]:
    """Let those that read their prompts do so, before the next step is launched.

    hidden: (tokens, hidden_size) of the plan's chunks, one after the other. Returns the sequences that draw nothing
    and are done with this step.
    """
    place = 0
    done: list[Sequence] = []
    for row in plan.rows[plan.num_decode :]:
        sequence, count = row.sequence, row.end - row.start
        if sequence.reading is not None:
            sequence.reading.take(hidden[place : place + count], row.start, lm_head)
        if not sequence.draws and row.end == len(sequence.tokens):
            done.append(sequence)
        place += count
    return tuple(done)

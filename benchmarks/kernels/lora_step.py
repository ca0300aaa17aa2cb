"""All LoRA work of one step of a model, between the base products that it is added to: what LoRA costs a step.

Every layer has weights of its own and every adapter its whole slab, so that neither stays in the L2 from layer to
layer. The same step is recorded without LoRA, and the two take turns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_store.layout import AdapterLayout
from benchmarks.common.distributions import choose_adapters
from benchmarks.common.report import Row
from benchmarks.common.timing import Recording, race
from benchmarks.kernels.case import Case
from benchmarks.kernels.setting import KernelSetting
from engine.linear import LoraStep, PackedLinear
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from engine.step import LoraState, StepInputs

# What a Llama-3-8B decode step of rank 16 may gain in milliseconds, by distribution and batch.
_DECODE_LIMITS_MS = {
    ("distinct", 1): 0.55,
    ("distinct", 8): 0.75,
    ("distinct", 32): 1.55,
    ("distinct", 64): 2.55,
    ("identical", 64): 0.5,
    ("base", 64): 0.25,
}
_PREFILL_LIMIT = 0.15  # of the base products


class LoraModel:
    """The linear layers of a model and adapters for them, all random.

    slots: adapters of ``rank``, each a whole slab as adapter_store packs it.
    """

    def __init__(self, setting: KernelSetting, layout: AdapterLayout, rank: int, slots: int) -> None:
        self.setting, self.layout, self.slots = setting, layout, slots
        self.layers = [
            {group.name: self._linear(group.in_features, group.out_features) for group in layout.groups}
            for _ in range(layout.num_layers)
        ]
        slab = rank * layout.units
        arena = setting.normal(slots * slab)
        table = torch.tensor([[slot * slab, rank] for slot in range(slots)], device=setting.device)
        groups = tuple(layout.lora_groups(layer) for layer in range(layout.num_layers))
        self.state = LoraState(arena=arena, slot_table=table, groups=groups, max_rank=rank)

    def _linear(self, in_features: int, out_features: tuple[int, ...]) -> PackedLinear:
        names = tuple(str(index) for index in range(len(out_features)))
        linear = PackedLinear(in_features, out_features, names, False, self.setting.dtype, self.setting.device)
        linear.weight.normal_(0, 1 / math.sqrt(in_features))
        return linear

    def inputs(self, lora_indices: list[int], length: int) -> StepInputs:
        """A step of one token a row, or of prompts of ``length`` tokens when that is more than 1.

        Decode rows are in the order that the scheduler gives them, so that neighbours may share an adapter.
        """
        lora_indices = sorted(lora_indices)
        rows, device = len(lora_indices), self.setting.device
        tokens = torch.zeros(rows * length, dtype=torch.int64, device=device)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
        return StepInputs(
            token_ids=tokens,
            positions=tokens,
            kv_slots=tokens,
            page_table=torch.zeros((rows, 1), dtype=torch.int32, device=device),
            query_starts=starts,
            context_lens=torch.full((rows,), length, dtype=torch.int32, device=device),
            lora_indices=torch.tensor(lora_indices, dtype=torch.int32, device=device),
            logit_tokens=starts[1:].long() - 1,
            num_decode_rows=rows if length == 1 else 0,
            num_lora_rows=rows if length == 1 else 0,  # as in a graph, where any row may come to have an adapter
            max_query_len=length if length > 1 else 0,
            has_lora=True,
        )

    def activations(self, tokens: int) -> dict[int, Tensor]:
        """One input for every width that a layer reads."""
        widths = {group.in_features for group in self.layout.groups}
        return {width: self.setting.normal(tokens, width) for width in widths}

    def run(self, activations: dict[int, Tensor], inputs: StepInputs | None) -> None:
        """Every product of every layer, in order, as ``engine.model`` makes them; LoRA when ``inputs`` are given."""
        lora = None if inputs is None else LoraStep(inputs, self.state)
        for layer, groups in zip(self.layers, self.state.groups, strict=True):
            for name, linear in layer.items():
                x = activations[linear.weight.shape[1]]
                out = linear(x)
                if lora is not None:
                    lora.add(x, out, groups[name])


@dataclass(frozen=True, slots=True)
class LoraStepCase(Case):
    """One row for each distribution and batch: milliseconds of the base products, with LoRA, and the difference.

    batches: rows of a step; with ``length`` above 1 they are prompts of so many tokens.
    """

    spec: ModelSpec
    rank: int
    slots: int
    batches: tuple[int, ...]
    dists: tuple[str, ...]
    length: int = 1

    def __str__(self) -> str:
        return f"LoRA step of {self.spec.name}, rank {self.rank}, {self.length} tokens a row"

    @property
    def compiled_as(self) -> Hashable:
        return "step", self.rank, self.length

    def run_once(self, setting: KernelSetting) -> None:
        """One layer with two adapters holds every kernel that the whole has."""
        layout = adapter_layout(self.spec)
        model = LoraModel(setting, AdapterLayout(layout.base_model, 1, layout.groups), self.rank, 2)
        for batch in self.batches:
            model.run(model.activations(batch * self.length), model.inputs([0] * batch, self.length))

    def rows(self, setting: KernelSetting) -> Iterator[Row]:
        layout = adapter_layout(self.spec)
        model = LoraModel(setting, layout, self.rank, self.slots)
        repeats = 2 if setting.device.type != "cuda" else 25 if self.length == 1 else 5
        for batch in self.batches:
            activations = model.activations(batch * self.length)
            base = Recording(lambda _, x=activations: model.run(x, None), setting.device, 1)
            for dist in self.dists:
                indices = choose_adapters(dist, batch, self.slots, random.Random(0))
                inputs = model.inputs(indices, self.length)
                lora = Recording(lambda _, x=activations, i=inputs: model.run(x, i), setting.device, 1)
                times = race({"base": base, "lora": lora}, repeats, setting.cold())
                yield self._row(setting, layout, batch, dist, indices, times["base"], times["lora"])

    def _row(
        self,
        setting: KernelSetting,
        layout: AdapterLayout,
        batch: int,
        dist: str,
        indices: list[int],
        base_us: float,
        lora_us: float,
    ) -> Row:
        used = len({index for index in indices if index >= 0})
        moved = used * self.rank * layout.units * setting.dtype.itemsize
        if self.length > 1:
            # Activations leave the L2: x is read, each output read and written, the shrunk written and read.
            wide = sum(group.in_features + 2 * sum(group.out_features) for group in layout.groups)
            narrow = sum(len(group.modules) for group in layout.groups) * self.rank
            moved += batch * self.length * layout.num_layers * (wide * setting.dtype.itemsize + narrow * 8)
        tokens = batch * self.length
        added = lora_us - base_us
        floor = moved / setting.bandwidth * 1e6
        limit = self._limit_us(batch, dist, base_us) if setting.device.type == "cuda" else None
        name = "lora_step" if self.length == 1 else f"lora_step {batch}x{self.length}"
        return {
            "kernel": name,
            "hidden": self.spec.hidden_size,
            "rank": self.rank,
            "batch": tokens,
            "dist": dist,
            "us": added,
            "bytes": moved,
            "flops": 2 * tokens * self.rank * layout.units if used else 0,
            "floor_us": floor,
            "of_copy": floor / added,
            "limit_us": limit,
            "ok": None if limit is None else added <= limit,
            "base_ms": base_us / 1e3,
            "lora_ms": lora_us / 1e3,
            "added_ms": added / 1e3,
        }

    def _limit_us(self, batch: int, dist: str, base_us: float) -> float | None:
        if self.length > 1:
            return _PREFILL_LIMIT * base_us
        if self.spec.hidden_size != 4096 or self.spec.num_layers != 32 or self.rank != 16:
            return None
        limit_ms = _DECODE_LIMITS_MS.get((dist, batch))
        return None if limit_ms is None else limit_ms * 1e3

"""Packed linear layers and the LoRA products that are added to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from engine.step import LoraState, StepInputs
from kernels.bgmv_expand import bgmv_expand_slices
from kernels.bgmv_shrink import bgmv_shrink_slices
from kernels.lora_group import LoraGroup
from kernels.sgmv import sgmv_expand, sgmv_shrink


class PackedLinear:
    """Projections of one input computed as one product: ``y = x @ weight.T + bias``.

    weight: ``(sum of out_features, in_features)``, the projections stacked in the order of ``names``;
    bias: ``(sum of out_features,)`` or None. Uninitialised until weights are loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        names: Sequence[str],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names, self.out_features = tuple(names), tuple(out_features)
        total = sum(self.out_features)
        self.weight = torch.empty((total, in_features), dtype=dtype, device=device)
        self.bias = torch.empty(total, dtype=dtype, device=device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """``(tokens, in_features)`` -> ``(tokens, sum of out_features)``, without LoRA."""
        return functional.linear(x, self.weight, self.bias)

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Each projection's name in a checkpoint and the view of the packed tensors that it fills."""
        for name, weight in zip(self.names, self.weight.split(self.out_features), strict=True):
            yield f"{prefix}{name}.weight", weight
        if self.bias is not None:
            for name, bias in zip(self.names, self.bias.split(self.out_features), strict=True):
                yield f"{prefix}{name}.bias", bias


class LoraStep:
    """LoRA for one forward pass: decode rows through the one-token kernels, prefill rows by segment.

    Holds the buffer of shrunk activations, which every group of every layer reuses: a group's two products
    follow each other on one stream, so nothing reads the buffer when the next group writes it.
    """

    def __init__(self, inputs: StepInputs, state: LoraState) -> None:
        tokens, rows, decode = inputs.token_ids.shape[0], inputs.lora_indices.shape[0], inputs.num_decode_rows
        self.state = state
        self.decode_rows = inputs.num_lora_rows
        self.has_prefill = rows > decode
        self.decode_indices = inputs.lora_indices[: self.decode_rows]
        self.prefill_indices = inputs.lora_indices[decode:]
        self.segment_starts = inputs.query_starts[decode:]
        self.max_segment = inputs.max_query_len
        groups = state.groups[0].values()
        size = max(max(self.decode_rows * group.splits, tokens * self.has_prefill) * group.slices for group in groups)
        self._shrunk = torch.empty(size * state.max_rank, dtype=torch.float32, device=state.arena.device)

    def add(self, x: Tensor, out: Tensor, group: LoraGroup) -> None:
        """``out += B A x`` in place, each row with its own adapter; rows of index -1 are left alone.

        x: ``(tokens, group.in_features)``; out: ``(tokens, group.out_total)``, both in the model's dtype.
        """
        arena, table = self.state.arena, self.state.slot_table
        # A slot is loaded and the step's indices are written before the step's first kernel is launched.
        if self.decode_rows:
            rows = self.decode_rows
            shrunk = self._view(group.splits, group.slices, rows)
            slots = (self.decode_indices, group)
            bgmv_shrink_slices(x[:rows], arena, table, shrunk, *slots, operands_ready=True)
            bgmv_expand_slices(shrunk, arena, table, out[:rows], *slots, operands_ready=True)
        if self.has_prefill:
            shrunk = self._view(group.slices, x.shape[0])
            segments = (self.segment_starts, self.prefill_indices, group, self.max_segment)
            sgmv_shrink(x, arena, table, shrunk, *segments, operands_ready=True)
            sgmv_expand(shrunk, arena, table, out, *segments, operands_ready=True)

    def _view(self, *shape: int) -> Tensor:
        size = math.prod(shape) * self.state.max_rank
        return self._shrunk[:size].view(*shape, self.state.max_rank)

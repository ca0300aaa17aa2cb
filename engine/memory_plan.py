"""What GPU memory goes to, from the settings and the base model's config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapter_store.layout import AdapterLayout
from engine.lora_targets import adapter_layout
from engine.settings import EngineSettings
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one replica's GPU memory, and what the KV cache makes of what is left.

    slots: bytes of each rank's class of slots. step: activations of the largest step and the logits, estimated.
    page: bytes of one KV page. free: what is left for KV, of which it takes ``kv_memory_fraction``. pages: those that
    fit, never more than every row can fill; 0 where weights, slots and a step leave nothing.
    """

    total: int
    reserved: int
    weights: int
    slots: Mapping[int, int]
    step: int
    page: int
    free: int
    pages: int
    page_size: int

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds, of all requests together."""
        return self.pages * self.page_size

    @classmethod
    def of(cls, spec: ModelSpec, settings: EngineSettings, dtype: torch.dtype, total: int, reserved: int) -> MemoryPlan:
        """total: bytes of GPU memory that the replica has. reserved: bytes for the CUDA context, libraries and captured
        steps. The engine itself measures, at its start, what this estimates.

        Raises ValueError when ``max_model_len`` is more than the model knows.
        """
        layout = adapter_layout(spec)
        size = dtype.itemsize
        weights = weight_elements(spec) * size
        slots = {rank: count * slab_bytes(layout, rank, dtype) for rank, count in settings.slots}
        hidden = 4 * spec.hidden_size + spec.q_size + 2 * spec.kv_size + 3 * spec.intermediate_size
        # Logits as they come, a copy of the rows that are looked at closely, and what ChangedRows keeps of every row.
        step = settings.max_batch_tokens * hidden * size + settings.max_rows * spec.vocab_size * (size + 4 + 8)
        page = page_bytes(spec, settings.page_size, dtype)
        free = total - reserved - weights - sum(slots.values()) - step
        one_context = -(-spec.context(settings.max_model_len) // settings.page_size)
        pages = settings.num_pages
        if pages is None:
            room = max(int(free * settings.kv_memory_fraction), 0) // page
            pages = min(room, settings.max_rows * one_context)
        return cls(total, reserved, weights, slots, step, page, free, pages, settings.page_size)


def slab_bytes(layout: AdapterLayout, rank: int, dtype: torch.dtype) -> int:
    """Bytes of one adapter of ``rank``, in a slot and in host memory alike."""
    return layout.slab_elements(rank) * dtype.itemsize


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV page of ``page_size`` tokens, over all layers."""
    return 2 * spec.num_layers * page_size * spec.kv_size * dtype.itemsize


def weight_elements(spec: ModelSpec) -> int:
    """Numbers in the base model's weights."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    attention = hidden * (spec.q_size + 2 * spec.kv_size) + spec.q_size * hidden
    biases = spec.qkv_bias * (spec.q_size + 2 * spec.kv_size) + spec.o_bias * hidden
    biases += spec.mlp_bias * (2 * inner + hidden) + spec.qk_norm * 2 * spec.head_dim
    layer = attention + 3 * hidden * inner + 2 * hidden + biases
    embeddings = spec.vocab_size * hidden * (1 if spec.tie_word_embeddings else 2)
    return spec.num_layers * layer + embeddings + hidden

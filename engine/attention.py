"""Attention of one step over the paged cache: decode rows and prefill chunks, each by its own kernel."""

from __future__ import annotations

from torch import Tensor

from engine.spec import ModelSpec
from engine.step import KVCache, StepInputs
from kernels.attention import paged_decode, paged_prefill
from kernels.fused import rope_write_kv


class AttentionStep:
    """Rotation, cache write and attention of every layer in one forward pass."""

    def __init__(self, spec: ModelSpec, cos_sin: Tensor, inputs: StepInputs, kv: KVCache) -> None:
        decode = inputs.num_decode_rows
        self.spec, self.cos_sin, self.inputs, self.kv = spec, cos_sin, inputs, kv
        self.scale = spec.head_dim**-0.5
        self.has_prefill = inputs.context_lens.shape[0] > decode
        self.decode_rows = (inputs.page_table[:decode], inputs.context_lens[:decode])
        self.prefill_rows = (inputs.page_table[decode:], inputs.query_starts[decode:], inputs.context_lens[decode:])

    def run(self, layer: int, qkv: Tensor, out: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
        """Write this step's keys and values into the cache, then attend.

        qkv: ``(tokens, q_size + 2 * kv_size)`` packed q|k|v, q rotated in place. out: ``(tokens, q_size)``.
        q_weight, k_weight: ``(head_dim,)`` norm weights on each head of q and k, or None.
        """
        spec, inputs = self.spec, self.inputs
        keys, values = self.kv.keys[layer], self.kv.values[layer]
        rope_write_kv(
            qkv,
            self.cos_sin,
            inputs.positions,
            inputs.kv_slots,
            keys,
            values,
            spec.num_heads,
            q_weight,
            k_weight,
            spec.rms_norm_eps,
        )
        q = qkv[:, : spec.q_size].unflatten(1, (spec.num_heads, spec.head_dim))
        out = out.view(q.shape)
        window, decode = spec.sliding_windows[layer], inputs.num_decode_rows
        if decode:
            paged_decode(q[:decode], keys, values, *self.decode_rows, out[:decode], self.scale, window)
        if self.has_prefill:
            paged_prefill(q, keys, values, *self.prefill_rows, out, self.scale, inputs.max_query_len, window)

"""The decoder: Llama, Mistral, Qwen2 and Qwen3 over a paged cache, with LoRA per row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionStep
from engine.linear import LoraStep, PackedLinear
from engine.rope import cos_sin_table
from engine.spec import ModelSpec
from engine.step import KVCache, LoraState, StepInputs
from kernels.fused import residual_rms_norm, silu_mul


class DecoderLayer:
    """One decoder layer: attention and gated MLP, each after an RMSNorm fused with the residual sum."""

    def __init__(self, spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.index, self.eps = index, spec.rms_norm_eps

        def vector(size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        def linear(in_features: int, bias: bool, **out_features: int) -> PackedLinear:
            return PackedLinear(in_features, tuple(out_features.values()), tuple(out_features), bias, dtype, device)

        self.input_norm, self.post_norm = vector(hidden), vector(hidden)
        self.q_norm = vector(spec.head_dim) if spec.qk_norm else None
        self.k_norm = vector(spec.head_dim) if spec.qk_norm else None
        kv_size = spec.kv_size
        self.qkv = linear(hidden, spec.qkv_bias, q_proj=spec.q_size, k_proj=kv_size, v_proj=kv_size)
        self.o = linear(spec.q_size, spec.o_bias, o_proj=hidden)
        self.gate_up = linear(hidden, spec.mlp_bias, gate_proj=inner, up_proj=inner)
        self.down = linear(inner, spec.mlp_bias, down_proj=hidden)

    def __call__(
        self, x: Tensor, residual: Tensor | None, attention: AttentionStep, lora: LoraStep | None
    ) -> tuple[Tensor, Tensor]:
        """One layer over ``(tokens, hidden)``.

        x: the last layer's output, or the embeddings when ``residual`` is None. residual: the sum so far,
        updated in place. Returns (output of this layer not yet added, residual).
        """
        groups = None if lora is None else lora.state.groups[self.index]

        def project(linear: PackedLinear, name: str, inputs: Tensor) -> Tensor:
            out = linear(inputs)
            if lora is not None and groups is not None:
                lora.add(inputs, out, groups[name])
            return out

        normed = torch.empty_like(x)
        residual_rms_norm(x, residual, self.input_norm, self.eps, normed, operands_ready=True)
        residual = x if residual is None else residual
        qkv = project(self.qkv, "qkv", normed)
        attended = qkv.new_empty((qkv.shape[0], self.o.weight.shape[1]))
        attention.run(self.index, qkv, attended, self.q_norm, self.k_norm)
        x = project(self.o, "o", attended)
        residual_rms_norm(x, residual, self.post_norm, self.eps, normed, operands_ready=True)
        gate_up = project(self.gate_up, "gate_up", normed)
        gated = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
        silu_mul(gate_up, gated)
        return project(self.down, "down", gated), residual

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint name and the tensor (or view) that it fills."""
        yield f"{prefix}input_layernorm.weight", self.input_norm
        yield f"{prefix}post_attention_layernorm.weight", self.post_norm
        if self.q_norm is not None and self.k_norm is not None:
            yield f"{prefix}self_attn.q_norm.weight", self.q_norm
            yield f"{prefix}self_attn.k_norm.weight", self.k_norm
        for linear, parent in (
            (self.qkv, "self_attn."),
            (self.o, "self_attn."),
            (self.gate_up, "mlp."),
            (self.down, "mlp."),
        ):
            yield from linear.checkpoint_tensors(prefix + parent)


class DecoderModel:
    """The whole model on one device. Tensors are uninitialised until ``engine.weights`` fills them.

    max_positions: rows of the rotary table; every position of every step must lie below it.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str, max_positions: int | None = None
    ) -> None:
        self.spec, self.dtype, self.device = spec, dtype, torch.device(device)
        self.max_positions = spec.max_position_embeddings if max_positions is None else max_positions
        if self.max_positions < 1:
            raise ValueError(f"max_positions is {max_positions}, expected at least 1")
        self.cos_sin = cos_sin_table(spec, self.max_positions, self.device)
        self.embed = torch.empty((spec.vocab_size, spec.hidden_size), dtype=dtype, device=self.device)
        self.lm_head = self.embed if spec.tie_word_embeddings else torch.empty_like(self.embed)
        self.norm = torch.empty(spec.hidden_size, dtype=dtype, device=self.device)
        self.layers = tuple(DecoderLayer(spec, index, dtype, self.device) for index in range(spec.num_layers))

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        """An uninitialised cache of this model's shape, dtype and device."""
        shape = (num_pages, page_size, self.spec.num_kv_heads, self.spec.head_dim)

        def tensors() -> tuple[Tensor, ...]:
            return tuple(torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.layers)

        return KVCache(keys=tensors(), values=tensors())

    def new_hidden(self, tokens: int) -> Tensor:
        """Uninitialised room for the hidden states of so many tokens."""
        return torch.empty((tokens, self.spec.hidden_size), dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(
        self,
        inputs: StepInputs,
        kv: KVCache,
        lora: LoraState | None = None,
        out: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits of ``inputs.logit_tokens``: ``(O, vocab_size)`` fp32. Writes keys and values into ``kv``.

        lora may be None only when ``inputs.has_lora`` is False. out: where to put the logits, in the model's dtype and
        not widened. hidden: where to put all tokens' hidden states behind the last norm, (T, hidden_size). Nothing here
        waits for the device.
        """
        assert lora is not None or not inputs.has_lora, "rows with adapters need the LoRA state"
        lora_step = LoraStep(inputs, lora) if lora is not None and inputs.has_lora else None
        attention = AttentionStep(self.spec, self.cos_sin, inputs, kv)
        x, residual = functional.embedding(inputs.token_ids, self.embed), None
        for layer in self.layers:
            x, residual = layer(x, residual, attention, lora_step)
        assert residual is not None
        normed = x if hidden is None else hidden
        residual_rms_norm(x, residual, self.norm, self.spec.rms_norm_eps, normed, operands_ready=True)
        normed = normed[inputs.logit_tokens]
        if out is None:
            return functional.linear(normed, self.lm_head).float()
        return torch.mm(normed, self.lm_head.t(), out=out)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor a checkpoint must hold, by name, and the tensor (or view) of this model that it fills."""
        yield "model.embed_tokens.weight", self.embed
        for index, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"model.layers.{index}.")
        yield "model.norm.weight", self.norm
        if not self.spec.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head

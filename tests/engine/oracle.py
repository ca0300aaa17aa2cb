"""Tiny random models and adapters, written by transformers and peft, which also say what is right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class TinyAdapter:
    """A PEFT adapter folder of a tiny model."""

    path: Path
    rank: int

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(slots=True)
class TinyModel:
    """A checkpoint folder and the same model in transformers (fp32, CPU, eager attention)."""

    path: Path
    hf: Any
    _loaded: dict[tuple[Path | None, torch.dtype], Any] = field(default_factory=dict)

    def adapter(
        self,
        name: str,
        rank: int,
        targets: str | Sequence[str] = ATTENTION + MLP,
        *,
        alpha: int | None = None,
        strength: float = 0.3,
        seed: int = 0,
        **lora_config: Any,
    ) -> TinyAdapter:
        """Write an adapter folder beside the model, through peft, with random A and B. Other arguments are
        LoraConfig's (use_rslora, rank_pattern, alpha_pattern, ...)."""
        from peft import LoraConfig, get_peft_model

        alpha = 2 * rank if alpha is None else alpha
        modules = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, lora_dropout=0.0, **lora_config)
        model = get_peft_model(copy.deepcopy(self.hf), config)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                fan_in = tensor.shape[1] if "lora_A" in key else rank
                scale = fan_in**-0.5 * (1.0 if "lora_A" in key else strength)
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        path = self.path.parent / f"{self.path.name}-{name}"
        model.save_pretrained(str(path))
        return TinyAdapter(path, rank)

    def logits(
        self, tokens: Sequence[int], adapter: TinyAdapter | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """fp32 logits of every position, ``(len(tokens), vocab)``, with that adapter alone applied by peft.

        dtype: what transformers and peft compute in.
        """
        with torch.inference_mode():
            return self._adapted(adapter, dtype)(torch.tensor([tokens])).logits[0].float()

    def hidden(self, tokens: Sequence[int], adapter: TinyAdapter | None = None) -> Tensor:
        """fp32 hidden states of every position behind the last norm, ``(len(tokens), hidden_size)``."""
        with torch.inference_mode():
            model = self._adapted(adapter, torch.float32)
            return model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]

    def _adapted(self, adapter: TinyAdapter | None, dtype: torch.dtype) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        key = (None if adapter is None else adapter.path, dtype)
        if key not in self._loaded:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, attn_implementation="eager")
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter.path, autocast_adapter_dtype=False).to(dtype)
            self._loaded[key] = model.eval()
        return self._loaded[key]


def build_tiny_model(path: Path, model_type: str, *, seed: int = 0, **config: Any) -> TinyModel:
    """Write a random checkpoint of ``model_type`` (llama, mistral, qwen2, qwen3) into ``path``.

    Norm weights and biases are random too, so that a forgotten one shows. config: overrides of ``SIZES``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(model_type, **{**SIZES, **config})
    hf_config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.data.copy_(1 + 0.2 * noise)
        elif tensor.ndim == 1:
            tensor.data.copy_(0.3 * noise)
        else:
            tensor.data.copy_(noise * tensor.shape[1] ** -0.5)
    model.save_pretrained(path)
    return TinyModel(path, model)

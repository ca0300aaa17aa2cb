"""Tiny random models of every served architecture, and adapters that PEFT itself made and saved for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterRefused
from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule
from adapter_store.packed import PackedAdapter
from kernels.lora_group import packed_rank

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
ALL_MODULES = [path.rsplit(".", 1)[-1] for paths in GROUPS.values() for path in paths]


def tiny_model(architecture: str) -> PreTrainedModel:
    """Random weights: 3 layers, hidden 24, 4 heads of 6 (8 where head_dim is free), 2 KV heads, inner width 40."""
    values: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if architecture == "qwen3":
        values["head_dim"] = 8
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values)).eval()


@functools.cache
def layout_for(architecture: str, base_model: str = "") -> AdapterLayout:
    """The layout that belongs to ``tiny_model``, read off its own modules."""
    model = tiny_model(architecture)

    def target(path: str) -> TargetModule:
        linear = model.get_submodule(f"model.layers.0.{path}")
        assert isinstance(linear, nn.Linear)
        return TargetModule(path, linear.in_features, linear.out_features)

    groups = tuple(TargetGroup(name, tuple(target(path) for path in paths)) for name, paths in GROUPS.items())
    return AdapterLayout(base_model, 3, groups)


def make_adapter(
    folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 1, **config: Any
) -> PeftModel:
    """Save an adapter with random A and B to ``folder`` by PEFT and return the model that it belongs to."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(tiny_model(architecture), LoraConfig(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder))
    return model


def peft_deltas(model: PeftModel) -> dict[str, Tensor]:
    """PEFT's own ``scale * B @ A`` (out, in) of every adapted module, by the module's path in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def slab_blocks(packed: PackedAdapter, layout: AdapterLayout) -> dict[str, tuple[Tensor, Tensor]]:
    """A (packed rank, in) and B (out, packed rank) of every module, as the kernels find them in the slab."""
    blocks: dict[str, tuple[Tensor, Tensor]] = {}
    rank = packed_rank(packed.rank)
    for path, layer, group, index in layout.modules():
        place = layout.lora_groups(layer)[group.name]
        inputs, outputs = place.in_features, place.out_features[index]
        a, b = rank * place.a_unit(index), rank * place.b_unit(index)
        blocks[path] = (
            packed.slab[a : a + rank * inputs].view(rank, inputs),
            packed.slab[b : b + outputs * rank].view(outputs, rank),
        )
    return blocks


def edit_config(folder: Path, **changes: Any) -> None:
    """Rewrite keys of a saved adapter_config.json; a value of Ellipsis removes the key."""
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of a saved adapter."""
    file = folder / WEIGHTS_FILE
    tensors: dict[str, Tensor | None] = {**load_file(file), **changes}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}, file)


def pack(
    folder: Path,
    architecture: str = "llama",
    max_rank: int = 64,
    dtype: torch.dtype = torch.float32,
    base_model: str = "",
) -> PackedAdapter:
    """Pack the saved adapter for ``tiny_model(architecture)`` under the name "tenant"."""
    return pack_checkpoint(folder, layout_for(architecture, base_model), max_rank, dtype, "tenant")


def refused(folder: Path, *parts: str, **kwargs: Any) -> None:
    """Packing is refused under the tenant's name with a reason that holds every part."""
    with pytest.raises(AdapterRefused) as error:
        pack(folder, **kwargs)
    assert error.value.adapter == "tenant"
    for part in parts:
        assert part in error.value.reason

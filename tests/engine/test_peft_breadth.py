"""Whatever PEFT saved for the served architectures loads unchanged, and its logits are PEFT's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.digest import WEIGHTS_FILE
from adapter_store.errors import AdapterRefused
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from tests.engine.oracle import ATTENTION, MLP, TinyAdapter, TinyModel
from tests.engine.paged import Row
from tests.engine.served import BASE, Served, prompt, serve

MakeModel = Callable[..., TinyModel]
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What LoraConfig can say of an adapter, and the rank and modules that it says it of.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 8},
    "rslora": {"rank": 16, "targets": ATTENTION, "use_rslora": True, "alpha": 8},
    "all-linear": {"rank": 4, "targets": "all-linear"},
    "rank-pattern": {"rank": 6, "rank_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.[qk]_proj": 16}},
    "alpha-pattern": {"rank": 5, "targets": ATTENTION, "alpha_pattern": {"q_proj": 1, "layers.0.self_attn.o_proj": 40}},
    "both-patterns-rslora": {
        "rank": 4,
        "targets": MLP,
        "rank_pattern": {"down_proj": 9},
        "alpha_pattern": {"down_proj": 5, "gate_proj": 2},
        "use_rslora": True,
    },
    "one-layer": {"rank": 8, "layers_to_transform": [1]},
    "one-layer-by-pattern": {"rank": 8, "layers_to_transform": 0, "layers_pattern": "layers"},
    "regex": {"rank": 8, "targets": r".*layers\.0\.(self_attn\.(q|v)_proj|mlp\.down_proj)"},
    "excluded": {"rank": 8, "exclude_modules": ["layers.1.mlp.up_proj", "k_proj"]},
    "bias-none-dropout": {"rank": 8, "targets": ("q_proj",), "bias": "none", "task_type": "CAUSAL_LM"},
    "odd-rank": {"rank": 1, "targets": ("o_proj", "gate_proj")},
}


@pytest.fixture(params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, tiny_model: MakeModel) -> Served:
    config = {"head_dim": 24} if request.param == "qwen3" else {}
    tiny = tiny_model(request.param, **config)
    assert type(tiny.hf).__name__ == ARCHITECTURES[request.param]
    return serve(tiny)


def logits(served: Served, tokens: list[int], slot: int) -> Row:
    row = Row(tokens, slot)
    served.runner().mixed_run([row], new_tokens=3, max_chunk=7)
    return row


def test_every_kind_of_adapter_on_every_architecture(served: Served) -> None:
    tokens = prompt(15, seed=3)
    base = served.tiny.logits(tokens)
    for number, (kind, config) in enumerate(KINDS.items()):
        adapter = served.tiny.adapter(f"kind-{kind}", **config, seed=number)
        row = logits(served, list(tokens), served.slot(adapter))
        served.check(row, adapter)
        assert (served.tiny.logits(tokens, adapter) - base).abs().max() > 0.05, f"{kind} changes nothing"
    served.check(logits(served, list(tokens), BASE), None)


def rewritten(adapter: TinyAdapter, name: str, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> TinyAdapter:
    """The same adapter with its tensors stored in another way."""
    folder = adapter.path.parent / f"{adapter.path.name}-{name}"
    shutil.copytree(adapter.path, folder, dirs_exist_ok=True)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(dict(change(key, tensor) for key, tensor in tensors.items()), folder / WEIGHTS_FILE)
    return replace(adapter, path=folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_files_in_half_precision(served: Served, dtype: torch.dtype) -> None:
    adapter = served.tiny.adapter("stored", 8, seed=5)
    stored = rewritten(adapter, str(dtype), lambda key, tensor: (key, tensor.to(dtype)))
    served.check(logits(served, prompt(12, seed=4), served.slot(stored)), stored)


def test_tensors_without_pefts_prefix(served: Served) -> None:
    adapter = served.tiny.adapter("named", 8, seed=6)
    bare = rewritten(adapter, "bare", lambda key, tensor: (key.removeprefix("base_model.model."), tensor))
    assert all(key.startswith("model.layers.") for key in load_file(bare.path / WEIGHTS_FILE))
    served.check(logits(served, prompt(12, seed=4), served.slot(bare)), adapter)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"fan_in_fan_out": True}], ids=str)
def test_what_cannot_be_applied_whole_is_refused_by_name(tiny_model: MakeModel, config: dict[str, Any]) -> None:
    tiny = tiny_model("llama")
    adapter = tiny.adapter(f"refused-{next(iter(config))}", 4, ("q_proj",), **config)
    if "fan_in_fan_out" in config:  # PEFT corrects it for nn.Linear; a file may still say so
        set_flag(adapter.path, "fan_in_fan_out")
    layout = adapter_layout(ModelSpec.from_dir(tiny.path))
    with pytest.raises(AdapterRefused, match=next(iter(config))):
        pack_checkpoint(adapter.path, layout, 16, torch.float32, "tenant")


def set_flag(folder: Path, key: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace(f'"{key}": false', f'"{key}": true'))

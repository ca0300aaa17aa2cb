"""Adapters written without PEFT, for tests that are not about their content."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule

LAYOUT = AdapterLayout(
    "acme/base",
    2,
    (
        TargetGroup(
            "qkv",
            (
                TargetModule("self_attn.q_proj", 8, 8),
                TargetModule("self_attn.k_proj", 8, 4),
                TargetModule("self_attn.v_proj", 8, 4),
            ),
        ),
        TargetGroup("o", (TargetModule("self_attn.o_proj", 8, 8),)),
    ),
)


def adapter_files(seed: int = 0, rank: int = 4, layout: AdapterLayout = LAYOUT, **config: object) -> dict[str, bytes]:
    """The two files of an adapter on every q_proj and v_proj, by file name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, _, group, index in layout.modules():
        if path.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, group.in_features, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(group.out_features[index], rank, generator=generator)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    return {CONFIG_FILE: json.dumps(values).encode(), WEIGHTS_FILE: save(tensors)}


def write_adapter(folder: Path, seed: int = 0, rank: int = 4, **config: object) -> Path:
    """Write ``adapter_files`` to a folder, as a publisher would: complete files moved into place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in adapter_files(seed, rank, **config).items():
        (folder / f".{name}").write_bytes(data)
        (folder / f".{name}").replace(folder / name)
    return folder

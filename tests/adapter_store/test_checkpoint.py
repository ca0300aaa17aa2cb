"""Packing: the slab holds exactly what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from adapter_store.digest import WEIGHTS_FILE
from adapter_store.packed import PackedAdapter
from tests.adapter_store.peft_adapters import (
    ALL_MODULES,
    ARCHITECTURES,
    edit_tensors,
    layout_for,
    make_adapter,
    pack,
    peft_deltas,
    refused,
    slab_blocks,
    tiny_model,
)


def assert_equals_peft(packed: PackedAdapter, deltas: dict[str, Tensor], architecture: str = "llama") -> None:
    """Every targeted module's B @ A equals PEFT's delta to fp32 rounding, every other module is zero."""
    assert deltas
    for path, (a, b) in slab_blocks(packed, layout_for(architecture)).items():
        if path in deltas:
            torch.testing.assert_close(b @ a, deltas[path], rtol=2e-6, atol=2e-5)
        else:
            assert not a.any() and not b.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 12, "target_modules": ALL_MODULES},
        {"r": 4, "lora_alpha": 16, "target_modules": ["down_proj", "k_proj"], "use_rslora": True},
        {"r": 3, "target_modules": "all-linear"},
    ],
    ids=["all", "rslora", "all-linear"],
)
def test_equals_peft_on_every_architecture(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    model = make_adapter(tmp_path, architecture, **config)
    packed = pack(tmp_path, architecture)
    assert packed.rank == config["r"]
    assert packed.slab.shape == (layout_for(architecture).slab_elements(config["r"]),)
    assert_equals_peft(packed, peft_deltas(model), architecture)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {r"model\.layers\.\d+\.self_attn\.q_proj": 6}, "use_rslora": True},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 2}},
        {"alpha_pattern": {r".*layers\.(0|2)\..*": 1}},
        {"target_modules": r".*\.(q_proj|mlp\.(gate|up)_proj)"},
        {"target_modules": r"model\.layers\.[12]\.self_attn\.[kv]_proj"},
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ALL_MODULES, "exclude_modules": r".*\.1\.mlp\..*"},
        {"target_modules": ["self_attn.q_proj", "model.layers.2.mlp.down_proj", "c_attn"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"init_lora_weights": "orthogonal", "r": 6},
    ],
    ids="-".join,
)
def test_equals_peft_whatever_the_config_selects(tmp_path: Path, config: dict[str, Any]) -> None:
    model = make_adapter(tmp_path, **config)
    assert_equals_peft(pack(tmp_path), peft_deltas(model))


_NAMES = st.sampled_from([*ALL_MODULES, "self_attn.q_proj", "layers.1.mlp.up_proj", "model.layers.2.self_attn.k_proj"])


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # no slow shrinking
@given(
    targets=st.lists(_NAMES, min_size=1, max_size=5, unique=True),
    excluded=st.lists(_NAMES, max_size=2, unique=True),
    layers=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True),
    ranks=st.dictionaries(_NAMES, st.integers(1, 9), max_size=3),
    alphas=st.dictionaries(_NAMES, st.integers(1, 32), max_size=3),
    rslora=st.booleans(),
)
def test_equals_peft_for_drawn_configs(
    tmp_path_factory: pytest.TempPathFactory,
    targets: list[str],
    excluded: list[str],
    layers: list[int] | None,
    ranks: dict[str, int],
    alphas: dict[str, int],
    rslora: bool,
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    try:
        make_adapter(
            folder,
            target_modules=targets,
            exclude_modules=excluded or None,
            layers_to_transform=layers,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=rslora,
        )
    except ValueError as error:  # PEFT: nothing is left to adapt
        assert "modules" in str(error)
        return
    # PEFT sorts the patterns when it saves, so with overlapping ones its own reload may differ from what was trained:
    # the reload is what tenants see elsewhere, and what it cannot load we must not load either.
    try:
        model = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
    except RuntimeError as error:
        assert "size mismatch" in str(error)
        refused(folder, "has shape")
    else:
        assert_equals_peft(pack(folder), peft_deltas(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_round_once(tmp_path: Path, stored: torch.dtype, served: torch.dtype) -> None:
    make_adapter(tmp_path, dtype=stored, lora_alpha=7, rank_pattern={"v_proj": 3})
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    packed = pack(tmp_path, dtype=served)
    assert packed.slab.dtype == served
    blocks = slab_blocks(packed, layout_for("llama"))
    for path, (a, b) in blocks.items():
        if path.endswith(("q_proj", "v_proj")):
            rank = 3 if path.endswith("v_proj") else 4
            stored_a = tensors[f"base_model.model.{path}.lora_A.weight"]
            stored_b = tensors[f"base_model.model.{path}.lora_B.weight"]
            assert torch.equal(a[:rank], stored_a.to(served))
            assert torch.equal(b[:, :rank], (stored_b.float() * (7 / rank)).to(served))
            assert not a[rank:].any() and not b[:, rank:].any()


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".other"])
def test_key_spellings(tmp_path: Path, prefix: str, infix: str) -> None:
    deltas = peft_deltas(make_adapter(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    renamed: dict[str, Tensor | None] = dict.fromkeys(tensors)
    for key, tensor in tensors.items():
        bare = key.removeprefix("base_model.model.").removesuffix(".weight")
        renamed[f"{prefix}{bare}{infix}.weight"] = tensor
    edit_tensors(tmp_path, renamed)
    assert_equals_peft(pack(tmp_path), deltas)


def test_packing_again_is_bit_identical(tmp_path: Path) -> None:
    make_adapter(tmp_path, r=5, rank_pattern={"v_proj": 3})
    first, second = pack(tmp_path, dtype=torch.bfloat16), pack(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(first.slab.view(torch.int16), second.slab.view(torch.int16))
    assert first.digest == second.digest

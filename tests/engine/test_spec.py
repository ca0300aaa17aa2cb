"""What config.json says, read as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_store.layout import AdapterLayout
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec, RopeSpec, UnsupportedModel

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def small(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelSpec:
    return ModelSpec.from_config({"architectures": [architecture], "num_key_value_heads": 2, **SMALL, **changes})


def test_llama_31_8b() -> None:
    assert ModelSpec.from_config(LLAMA_31_8B, name="llama") == ModelSpec(
        architecture="LlamaForCausalLM",
        name="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeSpec("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        sliding_windows=(0,) * 32,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        eos_token_ids=(128001, 128008, 128009),
        dtype="bfloat16",
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_absent_keys_mean_what_transformers_assumes(model_type: str) -> None:
    from transformers import AutoConfig

    sizes = {**SMALL, "num_attention_heads": 32, "head_dim": 16}
    theirs = AutoConfig.for_model(model_type, **sizes)
    ours = ModelSpec.from_config({"model_type": model_type, **sizes})
    assert ours.architecture == ARCHITECTURES[model_type]
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope == RopeSpec(theta=theirs.rope_parameters["rope_theta"])
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    window = getattr(theirs, "sliding_window", None) or 0
    assert ours.sliding_windows == (window,) * 4
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)


def test_head_dim_is_derived_or_explicit() -> None:
    assert small().head_dim == 16
    assert small(head_dim=None).head_dim == 16
    assert small(head_dim=24).head_dim == 24
    assert small("Qwen3ForCausalLM").head_dim == 128  # Qwen3's own default, not hidden / heads
    spec = small(head_dim=24)
    assert (spec.q_size, spec.kv_size) == (96, 48)


@pytest.mark.parametrize(
    ("architecture", "given", "qkv", "out"),
    [
        ("LlamaForCausalLM", {}, False, False),
        ("LlamaForCausalLM", {"attention_bias": True}, True, True),
        ("MistralForCausalLM", {"attention_bias": True}, False, False),  # Mistral's code has no such flag
        ("Qwen2ForCausalLM", {}, True, False),
        ("Qwen3ForCausalLM", {}, False, False),
        ("Qwen3ForCausalLM", {"attention_bias": True}, True, True),
    ],
)
def test_biases(architecture: str, given: dict[str, Any], qkv: bool, out: bool) -> None:
    spec = small(architecture, **given)
    assert (spec.qkv_bias, spec.o_bias) == (qkv, out)
    assert spec.qk_norm == (architecture == "Qwen3ForCausalLM")


@pytest.mark.parametrize(
    ("architecture", "given", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 7}, (7, 7, 7, 7)),
        ("LlamaForCausalLM", {"sliding_window": 7}, (0, 0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 7}, (0, 0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "use_sliding_window": True}, (0, 0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, (0, 7, 7, 7)),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (7, 0, 7, 0),
        ),
    ],
)
def test_sliding_windows(architecture: str, given: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert small(architecture, **given).sliding_windows == windows


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RopeSpec()),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec("linear", 5e5, 2.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            RopeSpec("linear", 5e5, 2.0),
        ),
        ({"rope_scaling": {"type": "yarn", **YARN}}, RopeSpec("yarn", 1e4, 4.0, 32768)),
        (
            {"rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": 1e6, "attention_factor": 1.5}},
            RopeSpec("yarn", 1e6, 4.0, 32768, attention_factor=1.5),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
            RopeSpec("yarn", 1e4, 4.0, 32768, beta_fast=16.0, beta_slow=2.0, truncate=False),
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 512},
                "max_position_embeddings": 2048,
            },
            RopeSpec("yarn", 1e4, 4.0, 512),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 2048},
            RopeSpec("yarn", 1e4, 4.0, 2048),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", **YARN}, "original_max_position_embeddings": 99},
            RopeSpec("yarn", 1e4, 4.0, 99),
        ),
    ],
)
def test_rope_in_the_layouts_of_both_transformers_versions(given: dict[str, Any], expected: RopeSpec) -> None:
    assert small(**given).rope == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, MistralForCausalLM, "
            r"Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": None, "model_type": "gemma"}, "'gemma' is not supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported; supported: def"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of type 'llama3' is None"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of type 'linear' is None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"use_mrope": True}, "use_mrope"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message) as caught:
        small(**given)
    assert isinstance(caught.value, ValueError)


def test_layer_types_must_cover_the_layers() -> None:
    for kinds in (["full_attention"], ["chunked_attention"] * 4):
        with pytest.raises(UnsupportedModel, match="layer_types"):
            small("Qwen2ForCausalLM", use_sliding_window=True, layer_types=kinds)


def test_from_dir_prefers_the_generation_configs_eos(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"some-model.config\.json does not exist"):
        ModelSpec.from_dir(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_31_8B))
    spec = ModelSpec.from_dir(folder)
    assert (spec.name, spec.eos_token_ids) == ("some-model", (128001, 128008, 128009))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert ModelSpec.from_dir(folder).eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert ModelSpec.from_dir(folder).eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "holds a JSON list")])
def test_a_broken_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=message):
        ModelSpec.from_dir(tmp_path)


def test_adapter_layout_of_a_model() -> None:
    spec = small(head_dim=24)
    layout = adapter_layout(spec)
    assert isinstance(layout, AdapterLayout)
    assert [group.name for group in layout.groups] == ["qkv", "o", "gate_up", "down"]
    assert [(group.in_features, group.out_features) for group in layout.groups] == [
        (64, (96, 48, 48)),
        (96, (64,)),
        (64, (96, 96)),
        (96, (64,)),
    ]
    paths = {path for path, *_ in layout.modules()}
    assert len(paths) == 4 * 7
    assert "model.layers.3.self_attn.v_proj" in paths
    assert "model.layers.0.mlp.down_proj" in paths
    per_rank = sum(m.in_features + m.out_features for group in layout.groups for m in group.modules)
    assert layout.units == 4 * per_rank

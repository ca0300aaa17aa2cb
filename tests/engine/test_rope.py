"""Rotary tables against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.rope import cos_sin_table, inverse_frequencies
from engine.spec import ModelSpec

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e6}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama-3.1": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    "llama-3.2": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "llama3-short": {**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 64, "high_freq_factor": 8.0},
    "yarn-qwen": {**YARN, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-short": {**YARN, "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    "yarn-given-factor": {**YARN, "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 1.25},
    "yarn-untruncated": {**YARN, "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False},
    "yarn-mscale": {
        **YARN,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
    },
    "yarn-factor-one": {**YARN, "factor": 1.0, "original_max_position_embeddings": 4096},
}


def hf_frequencies(parameters: dict[str, Any], **sizes: Any) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**BASE, **sizes}, rope_parameters=dict(parameters))
    kind = parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize("head_dim", [16, 96, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_and_attention_factor_equal_transformers(variant: str, head_dim: int) -> None:
    parameters = VARIANTS[variant]
    spec = ModelSpec.from_config({"model_type": "llama", **BASE, "head_dim": head_dim, "rope_parameters": parameters})
    expected, expected_factor = hf_frequencies(parameters, head_dim=head_dim)
    frequencies, factor = inverse_frequencies(spec.rope, head_dim)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_variants_really_differ() -> None:
    """Guards the comparison above against variants whose parameters have no effect at these sizes."""
    seen = {}
    for name, parameters in VARIANTS.items():
        frequencies, factor = hf_frequencies(parameters)
        seen[name] = (*frequencies.tolist(), factor)
    assert len(set(seen.values())) == len(VARIANTS)


@pytest.mark.parametrize("variant", ["default", "llama-3.1", "yarn-short"])
def test_table_equals_the_rotary_module(variant: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = VARIANTS[variant]
    spec = ModelSpec.from_config({"model_type": "llama", **BASE, "rope_parameters": parameters})
    table = cos_sin_table(spec, 300, "cpu")
    assert table.shape == (300, 128)
    assert table.dtype == torch.float32
    rotary = LlamaRotaryEmbedding(LlamaConfig(**BASE, rope_parameters=dict(parameters)))
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(300)[None])
    torch.testing.assert_close(table[:, :64], cos[0, :, :64], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 64:], sin[0, :, :64], rtol=0, atol=1e-6)


def test_yarn_scales_cos_and_sin() -> None:
    spec = ModelSpec.from_config({"model_type": "llama", **BASE, "rope_parameters": VARIANTS["yarn-given-factor"]})
    table = cos_sin_table(spec, 2, "cpu")
    torch.testing.assert_close(table[0, :64], torch.full((64,), 1.25))

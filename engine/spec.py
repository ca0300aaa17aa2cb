"""What a decoder-only base model is, read from its ``config.json``. Imports nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("float32", "float16", "bfloat16")

# What transformers' config classes assume where a key is absent from config.json.
_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_COMMON, "max_position_embeddings": 2048, "eos_token_id": 2},
    "MistralForCausalLM": {
        **_COMMON,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {**_COMMON, **_QWEN},
    "Qwen3ForCausalLM": {**_COMMON, **_QWEN, "head_dim": 128},
}
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class UnsupportedModel(ValueError):
    """A base model that this engine cannot run exactly; the message names the setting and what is supported."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: its type and parameters, under transformers' names.

    ``factor`` and ``original_max_positions`` are unused by type "default"; ``low_freq_factor`` and
    ``high_freq_factor`` belong to "llama3"; the rest to "yarn" (``attention_factor`` None: derived).
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape and options of one Llama, Mistral, Qwen2 or Qwen3 model.

    sliding_windows: per layer, how many latest positions a query sees; 0 for all. dtype: the checkpoint's own.
    eos_token_ids: ``generation_config.json``'s if it names any (as transformers' generate does), else
    ``config.json``'s. qk_norm: RMSNorm on each head of q and k before the rotation (Qwen3).
    """

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    sliding_windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def q_size(self) -> int:
        """Columns of q in the packed q|k|v."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of k (and of v) in the packed q|k|v."""
        return self.num_kv_heads * self.head_dim

    def context(self, asked: int | None) -> int:
        """Most tokens of a prompt and its completion together: ``asked``, or all that the model knows.

        Raises ValueError when more is asked for than the model knows.
        """
        if asked is not None and asked > self.max_position_embeddings:
            raise ValueError(
                f"max_model_len is {asked} but {self.name} knows {self.max_position_embeddings} positions: lower it"
            )
        return asked or self.max_position_embeddings

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelSpec:
        """Read ``config.json`` and, where present, ``generation_config.json`` of a checkpoint folder.

        Raises FileNotFoundError without a config.json, UnsupportedModel as ``from_config`` does.
        """
        folder = Path(path)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise FileNotFoundError(f"{config_file} does not exist: give the folder of a Hugging Face checkpoint")
        config = _read_json(config_file)
        generation_file = folder / "generation_config.json"
        if generation_file.is_file():
            eos = _read_json(generation_file).get("eos_token_id")
            if eos is not None:
                config["eos_token_id"] = eos
        return cls.from_config(config, name=folder.resolve().name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> ModelSpec:
        """Read the contents of a ``config.json``, in the layout of transformers 4 or 5.

        name: what to call the model in messages. Raises UnsupportedModel (a ValueError) for an architecture,
        activation, rope type or quantisation that the engine does not implement, and for missing sizes.
        """
        architecture = _architecture(config)
        values = {**_DEFAULTS[architecture], **config}
        _refuse_unsupported(values)
        sizes = {key: _size(values, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
        layers, heads = _size(values, "num_hidden_layers"), _size(values, "num_attention_heads")
        kv_heads = heads if values.get("num_key_value_heads") is None else _size(values, "num_key_value_heads")
        if heads % kv_heads:
            raise UnsupportedModel(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = _size(values, "head_dim") if values.get("head_dim") else sizes["hidden_size"] // heads
        if head_dim % 2:
            raise UnsupportedModel(f"head_dim is {head_dim}, but rotary embedding needs an even one")
        is_qwen2 = architecture == "Qwen2ForCausalLM"
        has_bias_flag = architecture in {"LlamaForCausalLM", "Qwen3ForCausalLM"}
        attention_bias = has_bias_flag and bool(values.get("attention_bias", False))
        return cls(
            architecture=architecture,
            name=name or str(values.get("_name_or_path") or architecture),
            **sizes,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_size(values, "max_position_embeddings"),
            rms_norm_eps=float(values["rms_norm_eps"]),
            rope=_rope(values),
            sliding_windows=_sliding_windows(architecture, values, layers),
            qkv_bias=attention_bias or is_qwen2,
            o_bias=attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(values.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=bool(values["tie_word_embeddings"]),
            eos_token_ids=_eos_ids(values.get("eos_token_id")),
            dtype=_dtype(values),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON or not UTF-8
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    model_type = str(config.get("model_type"))
    named = config.get("architectures") or [_MODEL_TYPES.get(model_type, model_type)]
    if named[0] in _DEFAULTS:
        return named[0]
    raise UnsupportedModel(f"architecture {named[0]!r} is not supported; supported: {', '.join(_DEFAULTS)}")


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    quantization = values.get("quantization_config") or values.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(f"quantised checkpoints are not supported (quant_method {method!r}): use the 16-bit one")
    if values["hidden_act"] != "silu":
        raise UnsupportedModel(f"hidden_act {values['hidden_act']!r} is not supported; supported: 'silu'")
    if values.get("use_mrope"):
        raise UnsupportedModel("use_mrope is set, but multimodal rotary embedding is not supported")


def _size(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _rope(values: Mapping[str, Any]) -> RopeSpec:
    """transformers 4 wrote rope_theta + rope_scaling, transformers 5 writes both as rope_parameters."""
    params = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in params.values()):
        raise UnsupportedModel(f"rope parameters per layer type ({', '.join(params)}) are not supported")

    def number(key: str, default: float | None = None) -> float:
        value = params.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UnsupportedModel(
                f"config.json: rope parameter {key} of type {kind!r} is {value!r}, expected a number"
            )
        return float(value)

    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = params.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in {None, 1}:
        raise UnsupportedModel(f"partial_rotary_factor {partial!r} is not supported: the whole head must rotate")
    theta = number("rope_theta", values.get("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec("linear", theta, number("factor"))
    longest = values["max_position_embeddings"]
    # A value outside the rope parameters wins, as in transformers.
    original = int(
        values.get("original_max_position_embeddings") or number("original_max_position_embeddings", longest)
    )
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return RopeSpec("llama3", theta, number("factor"), original, low, high)
    return RopeSpec(
        "yarn",
        theta,
        longest / original if params.get("factor") is None else number("factor"),
        original,
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        attention_factor=None if params.get("attention_factor") is None else number("attention_factor"),
        mscale=params.get("mscale"),
        mscale_all_dim=params.get("mscale_all_dim"),
        truncate=bool(params.get("truncate", True)),
    )


def _sliding_windows(architecture: str, values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = int(values.get("sliding_window") or 0)
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    if architecture == "LlamaForCausalLM" or not values["use_sliding_window"]:
        return (0,) * layers
    kinds = values.get("layer_types")
    if kinds is None:
        first = values["max_window_layers"]
        return tuple(window if layer >= first else 0 for layer in range(layers))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise UnsupportedModel(f"layer_types {kinds} must be {layers} of 'full_attention' or 'sliding_attention'")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _eos_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


def _dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name

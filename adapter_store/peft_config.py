"""What a PEFT adapter_config.json asks for, read strictly: what we cannot honour is refused, never ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.checkpoint_files import MAX_CONFIG_BYTES
from adapter_store.patterns import Pattern, is_plain, match_patterns

#: Keys that change how the adapter was trained or filed, not what it computes.
IGNORED_KEYS = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "runtime_config",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
        "megatron_core", "ensure_weight_tying",
    }
)  # fmt: skip

#: Keys whose meaning we read.
READ_KEYS = frozenset(
    {
        "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    }
)  # fmt: skip

#: Keys that, when set, make the adapter more than B @ A on linear layers; and what an adapter's owner can do.
REFUSED_KEYS: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base weights; train plain LoRA",
    "modules_to_save": "whole modules cannot be swapped per tenant; train LoRA on them instead",
    "bias": "trained biases are not served; train with bias='none'",
    "lora_bias": "a bias on lora_B is not served; train with lora_bias=false",
    "fan_in_fan_out": "transposed (Conv1D) weights are not served; save the adapter for nn.Linear layers",
    "trainable_token_indices": "trained token embeddings are not served; train without them",
    "target_parameters": "LoRA on bare parameters (mixture of experts) is not served; target linear layers",
    "layer_replication": "the base model has its own layers only; train without layer replication",
    "megatron_config": "Megatron's parallel layers are not served; export the adapter for nn.Linear layers",
    "alora_invocation_tokens": "activated LoRA, which switches on inside the prompt, is not served; train plain LoRA",
    "use_qalora": "QA-LoRA pools the inputs of quantized weights; train plain LoRA",
    "use_bdlora": "block-diagonal LoRA is not served; train plain LoRA",
    "arrow_config": "Arrow routes between several adapters; name one of them",
    "kasa_config": "KaSA changes the base weights; train plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; train plain LoRA",
}

#: Initialisations that take something out of the base weights, so that B @ A alone is not what was trained.
_MUTATING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class ModuleLora:
    """What the config promises of one module: its rank and the factor on B @ A."""

    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A LoRA config that can be applied whole. Field meanings are PEFT's ``LoraConfig``."""

    base_model: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes) -> PeftConfig:
        """Read the JSON text. Raises ValueError saying which key and value cannot be honoured and what to do."""
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"adapter_config.json has {len(data)} bytes; at most {MAX_CONFIG_BYTES} are read")
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"adapter_config.json is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError("adapter_config.json holds no object")
        _refuse_what_we_cannot_honour(raw)
        base_model = raw.get("base_model_name_or_path")
        return cls(
            base_model=base_model if isinstance(base_model, str) else "",
            r=_rank("r", raw.get("r")),
            lora_alpha=_number("lora_alpha", raw.get("lora_alpha")),
            use_rslora=_flag("use_rslora", raw.get("use_rslora")),
            rank_pattern={k: _rank(f"rank_pattern[{k!r}]", v) for k, v in _object(raw, "rank_pattern").items()},
            alpha_pattern={k: _number(f"alpha_pattern[{k!r}]", v) for k, v in _object(raw, "alpha_pattern").items()},
            target_modules=_names(raw, "target_modules"),
            exclude_modules=_names(raw, "exclude_modules"),
            layers_to_transform=_layers(raw),
            layers_pattern=_strings("layers_pattern", raw.get("layers_pattern")),
        )

    def modules(self, paths: Sequence[str]) -> dict[str, ModuleLora]:
        """Which of the base model's linear layers the config targets, by PEFT's own matching rules.

        paths: full module paths such as ``model.layers.0.self_attn.q_proj``. A listed name matches a path that equals
        it or ends in ``.name``; a string is a regular expression over the whole path; ``all-linear`` is every path;
        rank and alpha patterns match a path's end, the first in file order winning.
        Raises ValueError when a pattern cannot be evaluated.
        """
        rank_patterns = {key: _tail_pattern(key) for key in self.rank_pattern}
        alpha_patterns = {key: _tail_pattern(key) for key in self.alpha_pattern}
        layer_patterns = self._layer_patterns()
        regexes = [
            Pattern("full", text) for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)
        ]
        everything = (*regexes, *layer_patterns, *rank_patterns.values(), *alpha_patterns.values())
        found = match_patterns(everything, paths)

        def listed(names: str | tuple[str, ...], path: str) -> bool:
            if isinstance(names, str):
                return path in found[Pattern("full", names)]
            return any(path == name or path.endswith("." + name) for name in names)

        def layer_of(path: str) -> int | None:
            for pattern in layer_patterns:
                if path in found[pattern]:
                    return int(found[pattern][path])
            return None

        result: dict[str, ModuleLora] = {}
        for path in paths:
            if self.target_modules != "all-linear" and not listed(self.target_modules, path):
                continue
            if self.exclude_modules and listed(self.exclude_modules, path):
                continue
            # Layer numbers narrow down names that match by their end; a module listed by its whole path stays.
            layers = None if path in self.target_modules else self.layers_to_transform
            if layers is not None and layer_of(path) not in layers:
                continue
            rank = next((self.rank_pattern[k] for k, p in rank_patterns.items() if path in found[p]), self.r)
            alpha = next(
                (self.alpha_pattern[k] for k, p in alpha_patterns.items() if path in found[p]), self.lora_alpha
            )
            result[path] = ModuleLora(rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        return result

    def _layer_patterns(self) -> list[Pattern]:
        if self.layers_to_transform is None:
            return []
        if not self.layers_pattern:
            return [Pattern("prefix", r".*?\.[^.]*\.(?P<idx>\d+)\.", plain=True)]
        return [
            Pattern("prefix", rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", plain=is_plain(text))
            for text in self.layers_pattern
        ]


def _tail_pattern(key: str) -> Pattern:
    return Pattern("prefix", rf"(.*\.)?({key})$", plain=is_plain(key))


def _refuse_what_we_cannot_honour(raw: Mapping[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {raw.get('peft_type')!r}; only 'LORA' is served")
    for key, remedy in REFUSED_KEYS.items():
        value = raw.get(key)
        if value and not (key == "bias" and value == "none"):
            raise ValueError(f"{key} is {_short(value)}: {remedy}")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise ValueError(
            f"init_lora_weights is {init!r}, which changes the base weights; convert it to plain LoRA by saving it "
            "with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for key, value in raw.items():
        if key not in IGNORED_KEYS | READ_KEYS and key not in REFUSED_KEYS and value:
            raise ValueError(
                f"{key} is {_short(value)}, a setting not known here; take it out of adapter_config.json if it "
                "does not change what the adapter computes"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {_short(value)} but must be a whole number of 1 or more")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(_as_float(value)):
        raise ValueError(f"{name} is {_short(value)} but must be a finite number")
    return float(value)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {_short(value)} but must be true or false")
    return bool(value)


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)} but must map module names to values")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) and value else value or []
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{name} is {_short(value)} but must be a string or a list of strings")
    return tuple(items)


def _names(raw: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = raw.get(name)
    if isinstance(value, str) and value:
        return "all-linear" if name == "target_modules" and value.lower() == "all-linear" else value
    names = _strings(name, value)
    if name == "target_modules" and not names:
        raise ValueError("target_modules is empty; it must name the modules that the adapter was trained on")
    return names


def _layers(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == []:
        if raw.get("layers_pattern"):
            raise ValueError("layers_pattern is set without layers_to_transform")
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"layers_to_transform is {_short(value)} but must be a list of layer numbers")
    if isinstance(raw.get("target_modules"), str):
        raise ValueError("layers_to_transform cannot be combined with a pattern in target_modules; list module names")
    return tuple(layers)

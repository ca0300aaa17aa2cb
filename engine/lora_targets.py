"""Which linear layers of a base model an adapter may target, and how they are packed."""

from __future__ import annotations

from adapter_store.layout import AdapterLayout, TargetGroup, TargetModule
from engine.spec import ModelSpec


def adapter_layout(spec: ModelSpec) -> AdapterLayout:
    """The packing of any adapter of ``spec``: groups "qkv", "o", "gate_up" and "down" in every layer."""
    hidden, inner = spec.hidden_size, spec.intermediate_size

    def group(name: str, parent: str, in_features: int, **out_features: int) -> TargetGroup:
        modules = (TargetModule(f"{parent}.{module}", in_features, out) for module, out in out_features.items())
        return TargetGroup(name, tuple(modules))

    return AdapterLayout(
        base_model=spec.name,
        num_layers=spec.num_layers,
        groups=(
            group("qkv", "self_attn", hidden, q_proj=spec.q_size, k_proj=spec.kv_size, v_proj=spec.kv_size),
            group("o", "self_attn", spec.q_size, o_proj=hidden),
            group("gate_up", "mlp", hidden, gate_proj=inner, up_proj=inner),
            group("down", "mlp", inner, down_proj=hidden),
        ),
    )

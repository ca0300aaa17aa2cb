"""The geometry of a packed adapter: which modules LoRA may target and where each lies in the slab."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kernels.lora_group import LoraGroup, packed_rank


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One linear layer that an adapter may target.

    ``path`` is relative to the decoder layer, as in the checkpoint: ``self_attn.q_proj``.
    """

    path: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """The last part of the path, which is what PEFT's ``target_modules`` usually lists."""
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """Modules that read the same input and are computed as one packed linear (q|k|v, o, gate|up, down)."""

    name: str
    modules: tuple[TargetModule, ...]

    @property
    def in_features(self) -> int:
        return self.modules[0].in_features

    @property
    def out_features(self) -> tuple[int, ...]:
        return tuple(module.out_features for module in self.modules)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Layout of every adapter of one base model: ``[layer][group][A..., B...]`` at the adapter's own packed rank.

    ``layer_prefix`` is the checkpoint path of layer l with ``{}`` for l, e.g. ``model.layers.{}.``.
    """

    base_model: str
    num_layers: int
    groups: tuple[TargetGroup, ...]
    layer_prefix: str = "model.layers.{}."

    @property
    def layer_units(self) -> int:
        """Elements of one layer per unit of rank."""
        return sum(LoraGroup(0, g.in_features, g.out_features).size for g in self.groups)

    @property
    def units(self) -> int:
        """Elements of a whole adapter per unit of rank."""
        return self.num_layers * self.layer_units

    def slab_elements(self, rank: int) -> int:
        """Elements of a packed adapter of ``rank``."""
        return packed_rank(rank) * self.units

    def lora_groups(self, layer: int) -> dict[str, LoraGroup]:
        """The kernel-side group descriptors of one layer, by group name."""
        unit = layer * self.layer_units
        result: dict[str, LoraGroup] = {}
        for group in self.groups:
            result[group.name] = LoraGroup(unit, group.in_features, group.out_features)
            unit += result[group.name].size
        return result

    def modules(self) -> Iterator[tuple[str, int, TargetGroup, int]]:
        """Every targetable module as ``(full path, layer, group, index in group)``."""
        for layer in range(self.num_layers):
            for group in self.groups:
                for index, module in enumerate(group.modules):
                    yield self.layer_prefix.format(layer) + module.path, layer, group, index

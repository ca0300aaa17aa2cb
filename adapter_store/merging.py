"""Adapters merged into one, as PEFT's ``add_weighted_adapter`` merges them: A and B each for themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapter_store.checkpoint import LoraModules, max_weights_bytes, pack_modules, read_modules
from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.errors import AdapterChanged, AdapterError, AdapterRefused
from adapter_store.layout import AdapterLayout
from adapter_store.merging_recipe import Merge
from adapter_store.packed import PackedAdapter
from adapter_store.peft_config import ModuleLora
from adapter_store.source import ResolvedAdapter


def pack_merged(
    resolved: ResolvedAdapter,
    fetch: Callable[[ResolvedAdapter, int | None], CheckpointFiles],
    layout: AdapterLayout,
    max_rank: int,
    allocate: Callable[[int], Tensor],
) -> PackedAdapter:
    """Fetch the parts of ``resolved``, merge them and pack the result for ``layout``; see ``checkpoint.pack_files``.

    fetch: as ``AdapterSource.fetch``.
    Raises what ``fetch`` raises, and AdapterRefused for a part that could not be served alone, or that has another rank
    than the others in the same module: each under the merge's name, with the part's in the reason. AdapterChanged when
    its reference is not what its digest says.
    """
    merge, name = Merge.of(resolved.ref), resolved.name
    if merge.digest != resolved.digest:
        raise AdapterChanged(name, f"its parts are not those of the {resolved.digest[:12]} that was asked for")
    read: list[CheckpointFiles] = []
    try:
        parts: list[LoraModules] = []
        for part, content in zip(merge.parts, merge.contents(), strict=True):
            try:
                read.append(fetch(content, max_weights_bytes(layout, max_rank)))
                parts.append(_read_part(read[-1], layout))
            except AdapterError as error:
                raise part.error(name, error) from error
            except ValueError as error:
                raise part.error(name, AdapterRefused(part.name, str(error))) from error
        try:
            rank, slab = pack_modules(merge_modules(merge, parts, layout), layout, max_rank, allocate)
        except ValueError as error:
            raise AdapterRefused(name, str(error)) from error
    finally:
        for files in read:
            files.discard()
    return PackedAdapter(name, resolved.digest, rank, slab)


def merge_modules(merge: Merge, parts: Sequence[LoraModules], layout: AdapterLayout) -> LoraModules:
    """The merged adapter, in fp32 and with a scale of 1, on every module that any part is on.

    Each half is merged for itself: a part's weight times its scale goes into A and B by its square root, and its sign
    into A. Masks of the dares are drawn with ``merge.seed`` on the CPU in one order (by module as in the layout, half,
    part), and sums are taken in the order of the parts, so that every machine gets the same bits.

    Raises ValueError for parts of different rank in the same module.
    """
    draws = torch.Generator().manual_seed(merge.seed)
    promised: dict[str, ModuleLora] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, *_ in layout.modules():
        holders = [
            (named, part, part.promised[path])
            for named, part in zip(merge.parts, parts, strict=True)
            if path in part.promised
        ]
        if not holders:
            continue
        if len({module.rank for *_, module in holders}) > 1:
            told = ", ".join(f"{named.name!r} {module.rank}" for named, _, module in holders)
            raise ValueError(f"adapters of different rank cannot be merged; in {path!r} they have: {told}")
        weights = [named.weight * module.scale for named, _, module in holders]
        a, b = (
            _merge_half(merge, [part.pairs[path][half].float() for _, part, _ in holders], factors, draws)
            for half, factors in enumerate(
                (
                    [math.copysign(math.sqrt(abs(weight)), weight) for weight in weights],
                    [math.sqrt(abs(weight)) for weight in weights],
                )
            )
        )
        promised[path], pairs[path] = ModuleLora(holders[0][2].rank, 1.0), (a, b)
    return LoraModules(promised, pairs)


def _read_part(files: CheckpointFiles, layout: AdapterLayout) -> LoraModules:
    part = read_modules(files, layout)
    for path, pair in part.pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"lora_{half} of {path!r} holds NaN or infinite values")
    return part


def _merge_half(merge: Merge, tensors: list[Tensor], factors: list[float], draws: torch.Generator) -> Tensor:
    """One half of one module. tensors: (rank, in) or (out, rank) fp32 of each part, with its factor."""
    if merge.strategy == "ties":
        tensors = [_largest(tensor, merge.density) for tensor in tensors]
    elif merge.strategy != "linear":
        tensors = [_random(tensor, merge.density, draws) for tensor in tensors]
    weighted = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    if merge.strategy.endswith("linear"):
        return _sum(weighted)
    signs = [tensor.sign() for tensor in tensors]
    elected = torch.where(_sum(tensors if merge.majority_sign_method == "total" else signs) >= 0, 1.0, -1.0)
    agree = [(sign == elected).float() for sign in signs]
    return _sum([one * mask for one, mask in zip(weighted, agree, strict=True)]) / _sum(agree).clamp_(min=1.0)


def _sum(tensors: list[Tensor]) -> Tensor:
    """One after the other: a library's reduction may take another order on another processor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Without all but the share ``density`` of values that are largest by magnitude."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = torch.topk(flat.abs(), int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view(tensor.shape)


def _random(tensor: Tensor, density: float, draws: torch.Generator) -> Tensor:
    """With every value kept with probability ``density``, and what is kept made larger by as much."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=draws) / density

"""A PEFT LoRA checkpoint read from a folder and packed into one slab, whole or not at all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import WEIGHTS_FILE
from adapter_store.errors import AdapterRefused
from adapter_store.layout import AdapterLayout
from adapter_store.packed import PackedAdapter
from adapter_store.peft_config import ModuleLora, PeftConfig
from adapter_store.safetensors_view import view_safetensors
from kernels.lora_group import packed_rank

_HEADER_ALLOWANCE = 16 << 20  # bytes of a weights file that are not tensor data
_COMMIT = re.compile(r"[0-9a-f]{40}")
# base_model.model.<path>.lora_A.weight; the prefix and the adapter name before "weight" are optional.
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+?)\.lora_(?P<half>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True, slots=True)
class LoraModules:
    """What an adapter does to which modules, by their paths in the base model.

    promised: each one's rank and scale. pairs: its A (rank, in) and B (out, rank).
    """

    promised: Mapping[str, ModuleLora]
    pairs: Mapping[str, tuple[Tensor, Tensor]]


def max_weights_bytes(layout: AdapterLayout, max_rank: int) -> int:
    """The largest weights file that could be packed: every module at ``max_rank`` in fp32, and its header."""
    return 4 * max_rank * layout.units + _HEADER_ALLOWANCE


def pack_checkpoint(
    folder: Path, layout: AdapterLayout, max_rank: int, dtype: torch.dtype, name: str, *, pin_memory: bool = False
) -> PackedAdapter:
    """Read and pack the checkpoint in ``folder``. Raises AdapterRefused; see ``pack_files``."""
    files = CheckpointFiles.read(folder, name, max_weights_bytes(layout, max_rank))

    def allocate(elements: int) -> Tensor:
        return torch.empty(elements, dtype=dtype, pin_memory=pin_memory)

    return pack_files(files, layout, max_rank, allocate, name, digest=files.digest())


def pack_files(
    files: CheckpointFiles,
    layout: AdapterLayout,
    max_rank: int,
    allocate: Callable[[int], Tensor],
    name: str,
    *,
    digest: str,
) -> PackedAdapter:
    """Pack a checkpoint for ``layout`` at its own rank, the largest rank of its modules.

    allocate: gives memory for so many elements of the dtype that is wanted, with anything in it; what it raises passes.
    The slab is ``(layout.slab_elements(rank),)`` at the offsets of ``layout.lora_groups``. B is multiplied
    by the module's scale once, in fp32, before the cast. Modules of a smaller rank are padded with zeros, modules that
    the adapter does not target are zero.

    Raises AdapterRefused, with ``name`` and the offending key and value, for everything that would make the result
    differ from PEFT's: unsupported settings, a tensor without a module or a module without its tensors, wrong shapes or
    types, another base model, a rank above ``max_rank``, values that are not finite in the slab's dtype.
    """
    try:
        rank, slab = pack_modules(read_modules(files, layout), layout, max_rank, allocate)
    except ValueError as error:
        raise AdapterRefused(name, str(error)) from error
    return PackedAdapter(name, digest, rank, slab)


def read_modules(files: CheckpointFiles, layout: AdapterLayout) -> LoraModules:
    """What a checkpoint does to which modules. Its tensors are views of ``files``.

    Raises ValueError for what ``pack_files`` refuses, but for ranks and values that are not finite.
    """
    config = PeftConfig.parse(files.config)
    _check_base_model(config.base_model, layout.base_model)
    paths = [path for path, *_ in layout.modules()]
    promised = config.modules(paths)
    modules = LoraModules(promised, _pair_tensors(_parse_weights(files.weights), promised, frozenset(paths)))
    _check_shapes(modules, layout)
    return modules


def pack_modules(
    modules: LoraModules, layout: AdapterLayout, max_rank: int, allocate: Callable[[int], Tensor]
) -> tuple[int, Tensor]:
    """The largest rank, and the slab: see ``pack_files``. Raises ValueError for its rank and values."""
    promised = modules.promised
    rank = max(module.rank for module in promised.values())
    if rank > max_rank:
        raise ValueError(f"rank {rank} is above the largest slot class ({max_rank}); add a class or train a lower rank")
    count = sum(1 for _ in layout.modules())
    full = len(promised) == count and all(module.rank == packed_rank(rank) for module in promised.values())
    slab = allocate(layout.slab_elements(rank))
    if not full:  # zeroing takes as long as all the rest
        slab.zero_()
    _fill(slab, rank, layout, modules)
    _check_finite(slab, modules.pairs)
    return rank, slab


def _check_base_model(adapter_base: str, served: str) -> None:
    """Refuse an adapter of another base model, as far as names tell (shapes are checked anyway).

    The rule: the last components of the two names or paths must be equal, letter case aside, so that
    ``meta-llama/Llama-3.1-8B``, ``/models/Llama-3.1-8B`` and a Hub cache folder of it are one model. A missing name, or
    one that is a bare commit, says nothing and is not compared.
    """
    ours, theirs = _model_name(served), _model_name(adapter_base)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"it was trained for {adapter_base!r} but the base model here is {served!r}; if that is the same model, "
            "correct base_model_name_or_path in adapter_config.json, or set the server's engine.model_name to it"
        )


def _model_name(text: str) -> str:
    parts = [part for part in re.split(r"[/\\]", text) if part]
    for part in parts:
        if part.startswith("models--"):  # the Hub cache's folder: models--org--name/snapshots/<commit>
            return part.rsplit("--", 1)[-1].casefold()
    return "" if not parts or _COMMIT.fullmatch(parts[-1]) else parts[-1].casefold()


def _parse_weights(data: Tensor) -> dict[str, Tensor]:
    try:
        return view_safetensors(data)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS_FILE} cannot be read: {error}") from error


def _pair_tensors(
    tensors: Mapping[str, Tensor], promised: Mapping[str, ModuleLora], known: frozenset[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The (A, B) of every promised module. Raises ValueError unless tensors and promises match one to one."""
    if not tensors:
        raise ValueError(f"{WEIGHTS_FILE} holds no tensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):  # sorted, so that of several faults the same one is named
        match = _TENSOR.fullmatch(key)
        path = match["path"] if match else None
        if match is None or path not in known:
            raise ValueError(f"tensor {key!r} matches no module of this base model{_hint(key)}")
        if path not in promised:
            raise ValueError(f"tensor {key!r} belongs to a module that target_modules does not name")
        if match["half"] in halves.setdefault(path, {}):
            raise ValueError(f"tensor {key!r} is there twice for one module; save one adapter per folder")
        halves[path][match["half"]] = tensor
    for path in promised:
        missing = [f"lora_{half}" for half in "AB" if half not in halves.get(path, {})]
        if missing:
            raise ValueError(f"adapter_config.json targets {path!r} but its {' and '.join(missing)} tensor is missing")
    if not promised:
        raise ValueError("target_modules names no module of this base model")
    return {path: (pair["A"], pair["B"]) for path, pair in halves.items()}


def _hint(key: str) -> str:
    for part, reason in (
        ("lora_embedding_", ": LoRA on embeddings is not served"),
        ("lora_magnitude_vector", ": DoRA is not served"),
        ("modules_to_save", ": whole saved modules are not served"),
        ("embed_tokens", ": embeddings are shared by all tenants"),
        ("lm_head", ": the output head is shared by all tenants"),
        (".bias", ": biases are not served"),
    ):
        if part in key:
            return reason
    return ""


def _check_shapes(modules: LoraModules, layout: AdapterLayout) -> None:
    groups = [layout.lora_groups(layer) for layer in range(layout.num_layers)]
    for path, layer, target, index in layout.modules():
        if path not in modules.pairs:
            continue
        rank, group = modules.promised[path].rank, groups[layer][target.name]
        shapes = (rank, group.in_features), (group.out_features[index], rank)
        for half, tensor, shape in zip("AB", modules.pairs[path], shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"lora_{half} of {path!r} has shape {tuple(tensor.shape)} but base model and config make it {shape}"
                )


def _fill(slab: Tensor, rank: int, layout: AdapterLayout, modules: LoraModules) -> None:
    """Write every module to its place, in one thread and few calls: each takes the interpreter lock, and the step loop
    waits for it when several adapters are packed at a time."""
    rank = packed_rank(rank)
    groups = [layout.lora_groups(layer) for layer in range(layout.num_layers)]
    a_targets: list[Tensor] = []
    a_sources: list[Tensor] = []
    for path, layer, target, index in layout.modules():
        if path not in modules.pairs:
            continue
        (a, b), module = modules.pairs[path], modules.promised[path]
        group = groups[layer][target.name]
        inputs, outputs = group.in_features, group.out_features[index]
        a_start, b_start = rank * group.a_unit(index), rank * group.b_unit(index)
        a_targets.append(slab[a_start : a_start + rank * inputs].view(rank, inputs)[: module.rank])
        a_sources.append(a)
        b_target = slab[b_start : b_start + outputs * rank].view(outputs, rank)[:, : module.rank]
        if b.dtype == slab.dtype:  # the product is taken in fp32 and rounded once here too, thirty times faster
            torch.mul(b, module.scale, out=b_target)
        else:
            b_target.copy_(b.float() * module.scale)
    torch._foreach_copy_(a_targets, a_sources)  # pyright: ignore[reportPrivateImportUsage]


def _check_finite(slab: Tensor, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    lowest, highest = slab.aminmax()  # NaN comes through; a fiftieth of the time of an element-wise test
    if math.isfinite(lowest.item()) and math.isfinite(highest.item()):
        return
    for path, pair in pairs.items():
        for half, tensor in zip("AB", pair, strict=True):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"lora_{half} of {path!r} holds NaN or infinite values")
    raise ValueError(f"its values overflow {slab.dtype}")

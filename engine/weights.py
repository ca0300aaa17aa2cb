"""Fill a model from a safetensors checkpoint, or with random numbers for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapter_store.progress import Progress
from engine.model import DecoderModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint that does not hold exactly this model's tensors; the message names the tensor and the file."""


def load_weights(model: DecoderModel, path: str | Path) -> None:
    """Copy the safetensors of a checkpoint folder into ``model``, casting to its dtype on its device.

    Reads ``model.safetensors``, else the shards that ``model.safetensors.index.json`` names. With tied
    embeddings a stored ``lm_head.weight`` must equal the embedding. Raises FileNotFoundError where a file does
    not exist, CheckpointError for a tensor that is missing, unknown, stored twice, not floating point or of
    another shape, and for an unreadable file. After an error the model's content is undefined.
    """
    folder = Path(path)
    files, shard_of = _checkpoint_files(folder)
    targets = dict(model.checkpoint_tensors())
    found: dict[str, Path] = {}
    total = sum(file.stat().st_size for file in files if file.is_file())
    with Progress(f"loading {model.spec.name}", total) as progress:
        for file in files:
            try:
                _load_file(model, file, targets, found, progress)
            except SafetensorError as error:
                raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    missing = [name for name in targets if name not in found]
    if missing:
        where = folder / shard_of.get(missing[0], SINGLE_FILE)
        hint = "; should config.json say tie_word_embeddings?" if _HEAD in missing else ""
        raise CheckpointError(f"{len(missing)} tensors are missing, among them {missing[0]} (looked in {where}){hint}")
    if model.spec.tie_word_embeddings and _HEAD in found:
        _check_tied(model, found[_HEAD])


def random_weights(model: DecoderModel, seed: int) -> None:
    """Fill ``model`` on its device without a checkpoint: norms 1, all else normal with deviation 0.02.

    The same seed gives the same weights on the same kind of device. For benchmarks and tests of speed.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, target in model.checkpoint_tensors():
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02, generator=generator)


def _load_file(
    model: DecoderModel, file: Path, targets: Mapping[str, Tensor], found: dict[str, Path], progress: Progress
) -> None:
    """found: takes each tensor's name with the file that holds it."""
    with safe_open(file, framework="pt", device="cpu") as stored:
        for name in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in found:
                raise CheckpointError(f"tensor {name} is stored in both {found[name]} and {file}")
            found[name] = file
            if name in targets:
                tensor = stored.get_tensor(name)
                _copy(tensor, targets[name], name, file)
                progress.advance(tensor.nbytes)
            elif not _may_be_left(name, model):
                raise CheckpointError(
                    f"{file} holds tensor {name}, which the {model.spec.architecture} of its config.json lacks"
                )


def _checkpoint_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files to read, and for a sharded checkpoint which shard its index says holds which tensor."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE], {}
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        others = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {', '.join(others)} would be pickle, which is never opened: convert it" if others else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        shard_of = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file} is no safetensors index: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index_file} names {name!r}, which is no file of its own folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, but {index_file} names it: download it")
    return [folder / name for name in names], shard_of


def _may_be_left(name: str, model: DecoderModel) -> bool:
    # Old checkpoints also stored the rotary frequencies, which follow from config.json.
    return name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and model.spec.tie_word_embeddings)


def _copy(tensor: Tensor, target: Tensor, name: str, file: Path) -> None:
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {tensor.dtype}; quantised checkpoints are not supported"
        )
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"{file}: tensor {name} has shape {tuple(tensor.shape)}, but config.json asks for {tuple(target.shape)}"
        )
    target.copy_(tensor)


def _check_tied(model: DecoderModel, file: Path) -> None:
    with safe_open(file, framework="pt", device="cpu") as stored:
        head = stored.get_tensor(_HEAD)
    if head.shape != model.embed.shape or not torch.equal(head.to(model.embed), model.embed):
        raise CheckpointError(
            f"{file}: {_HEAD} differs from the embedding although config.json says tie_word_embeddings: "
            "set it to false to use the stored one"
        )

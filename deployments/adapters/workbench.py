"""Adapters looked at outside of a server, by the very code that a server runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from adapter_store.catalog import Catalog
from adapter_store.checkpoint import max_weights_bytes, pack_files
from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE
from adapter_store.errors import AdapterRefused
from adapter_store.merging import pack_merged
from adapter_store.merging_recipe import Merge
from adapter_store.names import NamedAdapter
from adapter_store.packed import PackedAdapter
from adapter_store.references import parse_reference
from adapter_store.source import AdapterRef, ResolvedAdapter
from deployments.settings import FleetSettings
from engine.lora_targets import adapter_layout
from engine.parts import dtype_on
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is known of an adapter. rank, slot_rank and packed_bytes are None where it was not packed."""

    reference: str
    digest: str
    rank: int | None = None
    slot_rank: int | None = None
    packed_bytes: int | None = None

    def told(self) -> dict[str, Any]:
        """What is known, by name."""
        fields = ("reference", "digest", "rank", "slot_rank", "packed_bytes")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


class Workbench:
    """Adapters of one base model under one server's settings."""

    def __init__(self, settings: FleetSettings) -> None:
        """Raises ValueError and OSError for a base model or a folder that cannot be read."""
        engine = settings.engine_settings()
        spec = ModelSpec.from_dir(settings.model_folder())
        if engine.model_name is not None:
            spec = replace(spec, name=engine.model_name)
        self._catalog = Catalog(settings.store_settings())
        self._layout = adapter_layout(spec)
        self._ranks = sorted(rank for rank, _ in engine.slots)
        # What a server keeps adapters in: on a GPU, unless the settings say otherwise.
        self._dtype = dtype_on(engine, torch.device("cpu" if engine.device == "cpu" else "cuda"))

    def named(self) -> list[NamedAdapter]:
        """Every adapter that has a name."""
        return [self._catalog.named(name) for name in self._catalog.names()]

    def here(self, named: NamedAdapter) -> dict[str, Any]:
        """What this machine knows of it without asking anybody: ``digest`` and ``on_disk``."""
        if named.ref.source == "local":
            try:
                return {"digest": self._catalog.resolve_ref(named.name, named.ref).digest, "on_disk": True}
            except AdapterRefused as error:
                return {"digest": None, "on_disk": False, "reason": error.reason}
        return {"digest": named.ref.digest, "on_disk": self._catalog.at_hand(named.ref, named.ref.digest)}

    def packed(self, name: str) -> Adapter:
        """Pack it as a replica would. Raises what a request for it would be told."""
        resolved = self._resolved(name)
        if resolved.ref.source == "merge":
            made = pack_merged(resolved, self._catalog.fetch, self._layout, self._ranks[-1], self._allocate)
            return self._about(resolved, made)
        files = self._fetched(resolved)
        try:
            return self._pack(resolved, files)
        finally:
            files.discard()

    def write(self, name: str, folder: Path) -> Adapter:
        """Write what is served of it to ``folder``: its two files, tensors in the type they are served in.

        Raises what a request for it would be told, also of what was written, and OSError where the folder cannot be
        made or has files in it.
        """
        resolved = self._resolved(name)
        files = self._fetched(resolved)
        try:
            self._pack(resolved, files)
            tensors = {key: value.to(self._dtype) for key, value in load(files.weights.numpy().tobytes()).items()}
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise FileExistsError(17, "it is not empty: name a new folder", str(folder))
            config = json.loads(files.config) | {"inference_mode": True}
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        finally:
            files.discard()
        return self.packed(str(folder))

    def fetched(self, name: str) -> Adapter:
        """Bring it to this machine's disk cache, if it is not there or in a folder of this machine."""
        resolved = self._resolved(name)
        for one in Merge.of(resolved.ref).contents() if resolved.ref.source == "merge" else (resolved,):
            self._fetched(one).discard()
        return Adapter(str(resolved.ref), resolved.digest)

    def close(self) -> None:
        """Close connections."""
        self._catalog.close()

    def _resolved(self, name: str) -> ResolvedAdapter:
        ref = AdapterRef("local", str(Path(name).absolute())) if Path(name).is_dir() else None
        if ref is None and AdapterRef.is_meant(name):
            try:
                ref = parse_reference(name)
            except ValueError as error:
                raise AdapterRefused(name, str(error)) from error
        return self._catalog.resolve_ref(name, self._catalog.find(name) if ref is None else ref)

    def _fetched(self, resolved: ResolvedAdapter) -> CheckpointFiles:
        return self._catalog.fetch(resolved, max_weights_bytes(self._layout, self._ranks[-1]))

    def _allocate(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=self._dtype)

    def _pack(self, resolved: ResolvedAdapter, files: CheckpointFiles) -> Adapter:
        packed = pack_files(
            files,
            self._layout,
            self._ranks[-1],
            self._allocate,
            resolved.name,
            digest=resolved.digest,
        )
        return self._about(resolved, packed)

    def _about(self, resolved: ResolvedAdapter, packed: PackedAdapter) -> Adapter:
        slot_rank = next(rank for rank in self._ranks if rank >= packed.rank)
        return Adapter(str(resolved.ref), resolved.digest, packed.rank, slot_rank, packed.nbytes)

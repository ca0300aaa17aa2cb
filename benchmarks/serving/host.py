"""The server that ``benchmarks.serving`` measures when it is not told of one: ours, with as many adapters as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.synthetic import SHAPES, write_model_config, write_random_adapters
from benchmarks.serving.prompt_text import WORDS
from benchmarks.serving.server import ROOT, TRANSPORT, Server
from benchmarks.serving.synthetic_tokenizer import write_tokenizer
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ServingHost:
    """shape: None for the demo model, else a shape of ``benchmarks.common.synthetic`` with random weights and a
    tokenizer of words. adapters: None for the demo's own (with a shape, none), else that many random ones of ``rank``.
    slots, rows: adapter slots and rows of a replica; None leaves what serve_config.yaml says, for adapters made here
    one slot each up to 32. folder: where model and adapters are made, for several servers; None for this server's own.
    changed: what else to set in the configuration, ``section.key`` -> value."""

    shape: str | None = None
    adapters: int | None = None
    rank: int = 16
    slots: int | None = None
    rows: int | None = None
    replicas: int = 1
    num_gpus: float | None = None
    gateways: int = 1
    folder: Path | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)

    def start(self, seconds: float) -> Server:
        """A started server, to be stopped by the caller. Raises RuntimeError when it is not up in time."""
        server = Server()
        try:
            self.configure(server)
        except BaseException:
            server.stop()
            raise
        server.start("robot, old, eats, school", seconds)
        return server

    def configure(self, server: Server) -> None:
        """Write model and adapters into the server's folder and change its configuration accordingly."""
        config = server.config
        engine = config["engine"]
        model = ROOT / config["model"]
        made = self.folder or server.folder
        server.env |= TRANSPORT
        if self.shape is not None:
            model = write_model_config(made / "model", self.shape)
            write_tokenizer(model, SHAPES[self.shape]["vocab_size"], WORDS)
            config |= {"model": str(model), "model_name": self.shape}
            engine |= {"load_random_weights": True, "seed": 0}
        if self.adapters is not None or self.shape is not None:
            count = self.adapters or 0
            layout = adapter_layout(replace(ModelSpec.from_dir(model), name=server.base_model))
            folder = made / "adapters"
            folder.mkdir(exist_ok=True)
            write_random_adapters(folder, layout, {f"adapter-{number:03d}": self.rank for number in range(count)})
            config["adapter_folders"] = [str(folder)]
            engine["slots"] = {self.rank: min(max(count, 1), 32)}
            slab = (2 if torch.cuda.is_available() else 4) * self.rank * layout.units
            store = config["store"]
            # All of them, and some more, since pieces of it may be too small.
            store["host_cache_bytes"] = max(store["host_cache_bytes"], 5 * count * slab // 4)
        if self.slots is not None:
            engine["slots"] = {self.rank: self.slots}
        if self.rows is not None:
            engine["max_rows"] = self.rows
        config["replicas"]["num_replicas"] = self.replicas
        if self.num_gpus is not None:
            config["replicas"]["num_gpus"] = self.num_gpus
        config["gateway"] = config.get("gateway", {}) | {"num_replicas": self.gateways}
        for key, value in self.changed.items():
            section, _, name = key.rpartition(".")
            (config.setdefault(section, {}) if section else config)[name] = value

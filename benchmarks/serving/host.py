"""The server that ``benchmarks.serving`` measures when it is not told of one: ours, with as many adapters as wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.common.synthetic import SHAPES, write_model_config, write_random_adapter
from benchmarks.serving.prompt_text import WORDS
from benchmarks.serving.server import ROOT, Server
from benchmarks.serving.synthetic_tokenizer import write_tokenizer
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ServingHost:
    """shape: None for the demo model, else a shape of ``benchmarks.common.synthetic`` with random weights and a
    tokenizer of words. adapters: None for the demo's own (with a shape, none), else that many random ones of ``rank``.
    slots, rows: adapter slots and rows of a replica; None leaves what serve_config.yaml says, for adapters made here
    one slot each up to 32."""

    shape: str | None = None
    adapters: int | None = None
    rank: int = 16
    slots: int | None = None
    rows: int | None = None
    replicas: int = 1
    num_gpus: float | None = None

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
        if self.shape is not None:
            model = write_model_config(server.folder / "model", self.shape)
            write_tokenizer(model, SHAPES[self.shape]["vocab_size"], WORDS)
            config |= {"model": str(model), "model_name": self.shape}
            engine |= {"load_random_weights": True, "seed": 0}
        if self.adapters is not None or self.shape is not None:
            count = self.adapters or 0
            layout = adapter_layout(replace(ModelSpec.from_dir(model), name=server.base_model))
            folder = server.folder / "adapters"
            folder.mkdir()
            for number in range(count):
                write_random_adapter(folder / f"adapter-{number:03d}", layout, self.rank, number)
            config["adapter_folders"] = [str(folder)]
            engine["slots"] = {self.rank: min(max(count, 1), 32)}
            slab = 4 * self.rank * layout.units
            store = config["store"]
            store["host_cache_bytes"] = max(store["host_cache_bytes"], 2 * count * slab)
        if self.slots is not None:
            engine["slots"] = {self.rank: self.slots}
        if self.rows is not None:
            engine["max_rows"] = self.rows
        config["replicas"]["num_replicas"] = self.replicas
        if self.num_gpus is not None:
            config["replicas"]["num_gpus"] = self.num_gpus

"""Adapters that a test publishes while the server runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .server import ROOT, Server

FILES = ("adapter_model.safetensors", "adapter_config.json")


def publish(server: Server, name: str, like: str, **config: object) -> Path:
    """Put a copy of a demo adapter, with ``config`` changed, where the server looks for adapters."""
    folder = server.adapters / name
    folder.mkdir(exist_ok=True)
    source = ROOT / "examples" / "demo" / "adapters" / like
    changed = json.loads((source / FILES[1]).read_text()) | config
    shutil.copyfile(source / FILES[0], folder / FILES[0])
    (folder / FILES[1]).write_text(json.dumps(changed))
    return folder

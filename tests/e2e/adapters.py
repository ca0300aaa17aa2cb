"""Adapters that a test publishes while the server runs."""

from __future__ import annotations

import json
from pathlib import Path

from .server import ROOT, Server

FILES = ("adapter_model.safetensors", "adapter_config.json")


def publish(server: Server, name: str, like: str, **config: object) -> Path:
    """Put a copy of a demo adapter, with ``config`` changed, where the server looks for adapters."""
    return write(server.adapters / name, like, **config)


def write(folder: Path, like: str, **config: object) -> Path:
    """The same anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files(like, **config).items():
        (folder / file).write_bytes(content)
    return folder


def files(like: str, **config: object) -> dict[str, bytes]:
    """A demo adapter's two files, with ``config`` changed: for the Hub of the tests."""
    source = ROOT / "examples" / "demo" / "adapters" / like
    changed = json.loads((source / FILES[1]).read_text()) | config
    return {FILES[0]: (source / FILES[0]).read_bytes(), FILES[1]: json.dumps(changed).encode()}

"""Writing ``kernels/configs/<device>.json``, the file that ``kernels.op_configs`` reads."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import package_versions

Row = dict[str, Any]
Key = tuple[str, int, int]  # op, hidden, rank


def key_of(row: Row) -> Key:
    return row["op"], row["hidden"], row["rank"]


def table_path(folder: Path, device: str) -> Path:
    """Where the table of a device lies, by the name that CUDA reports."""
    return folder / f"{device.replace(' ', '_')}.json"


def merged(old: Sequence[Row], new: Sequence[Row], tuned: Collection[Key]) -> list[Row]:
    """``new`` in place of what ``old`` has for the ``tuned`` keys, beside all else of ``old``, in order."""
    kept = [row for row in old if key_of(row) not in tuned]
    return sorted([*kept, *new], key=lambda row: (*key_of(row), row["batch"]))


def update_table(path: Path, device: str, new: Sequence[Row], tuned: Collection[Key]) -> list[Row]:
    """Merge into the file, one row a line; returns its rows. A table without rows is no file."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = merged(old, new, tuned)
    if not rows:
        path.unlink(missing_ok=True)
        return rows
    head = {"device": device, "versions": package_versions(("torch", "triton"))}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["{", *lines, ' "rows": [', body, " ]", "}", ""]))
    return rows

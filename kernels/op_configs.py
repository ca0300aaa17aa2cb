"""Launch configurations of the LoRA kernels: a tuned table for the device where there is one, else defaults.

A table is ``configs/<device name with underscores>.json``::

    {"device": "...", "rows": [{"op": "expand", "hidden": 4096, "rank": 16, "batch": 8,
                                "config": {"BLOCK_N": 128, "SPLIT_N": 32, "num_warps": 4}, "us": 2.1}, ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

CONFIGS_DIR = Path(__file__).parent / "configs"

EXPAND_KEYS = ("BLOCK_N", "SPLIT_N", "num_warps", "num_stages")
EXPAND_SLICES_KEYS = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
SHRINK_KEYS = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
SGMV_KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
POWERS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")

_OP_KEYS = {
    "expand": EXPAND_KEYS,
    "expand_slices": EXPAND_SLICES_KEYS,
    "shrink": SHRINK_KEYS,
    "shrink_slices": SHRINK_KEYS,
    "sgmv_shrink": SGMV_KEYS,
    "sgmv_expand": SGMV_KEYS,
}
_ALIASES = {"bgmv_expand": "expand", "bgmv_shrink": "shrink"}


def get_lora_op_configs(op_type: str, batch: int, hidden: int, *, rank: int = 16, device: str = "") -> dict[str, int]:
    """Launch parameters of one LoRA kernel.

    Args:
        op_type: ``expand``, ``shrink``, ``expand_slices``, ``shrink_slices``, ``sgmv_expand`` or ``sgmv_shrink``
            (``bgmv_expand`` and ``bgmv_shrink`` mean the first two).
        batch: rows (tokens for sgmv).
        hidden: output width for expand, input width for shrink.
        rank: the adapters' rank, or the largest of a mixed batch.
        device: device name as CUDA reports it; by default the current one.

    Returns:
        The row of the device's table that is nearest in rank, then hidden, then batch (by ratio); without a table
        the defaults of :func:`default_config`.

    Raises:
        ValueError: unknown ``op_type``.
    """
    op = _ALIASES.get(op_type, op_type)
    if op not in _OP_KEYS:
        raise ValueError(f"op_type {op_type!r} is unknown; use one of {', '.join(_OP_KEYS)}")
    return dict(_config(op, batch, hidden, rank, device or _current_device()))


def packed(keys: Sequence[str], override: Mapping[str, int] | None) -> list[int] | None:
    """A caller's override as the integers of ``keys`` in order, 0 for absent: what a torch operator can take."""
    return [override.get(key, 0) for key in keys] if override else None


def unpacked(keys: Sequence[str], values: Sequence[int] | None) -> dict[str, int]:
    """The inverse of :func:`packed`: the keys that were given."""
    return {key: value for key, value in zip(keys, values or (), strict=False) if value}


@lru_cache(maxsize=4096)
def _config(op: str, batch: int, hidden: int, rank: int, device: str) -> MappingProxyType[str, int]:
    rows = [row for row in read_table(CONFIGS_DIR / f"{device.replace(' ', '_')}.json") if row["op"] == op]
    config = nearest(rows, batch, hidden, rank)["config"] if rows else default_config(op, hidden, rank)
    return MappingProxyType(dict(config))


@lru_cache(maxsize=8)
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _current_device() -> str:
    return _device_name(torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=8)
def read_table(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of one tuned table; none where the file does not exist."""
    return tuple(json.loads(path.read_text())["rows"]) if path.exists() else ()


def nearest(rows: list[dict[str, Any]], batch: int, hidden: int, rank: int) -> dict[str, Any]:
    """The row whose rank, then hidden, then batch is nearest by ratio. ``rows`` must not be empty."""

    def distance(row: dict[str, Any]) -> tuple[float, float, float]:
        pairs = ((rank, row["rank"]), (hidden, row["hidden"]), (max(batch, 1), row["batch"]))
        return tuple(abs(math.log2(want / have)) for want, have in pairs)  # pyright: ignore[reportReturnType]

    return min(rows, key=distance)


def default_config(op: str, hidden: int, rank: int) -> dict[str, int]:
    """Defaults for a device without a table. None depends on the batch, so a row's bits do not either.

    - expand: one tile a program (SPLIT_N = tiles), about 2048 weights a tile: enough loads in flight for a
      bandwidth-bound read, small enough that narrow outputs still fill the device.
    - expand_slices: the same, and rank in steps of 16, so that a mixed batch computes at each adapter's own rank.
    - shrink: two rank rows a program, so that rank 16 of one row spreads over eight programs and the input row is
      read once for both; 1024 columns a step.
    - sgmv: 16 is the smallest edge that the tensor cores take, and ranks are small; 64 output columns and 64
      tokens keep a tile's accumulator in registers at four warps.
    """
    width = _power_of_two(rank)
    if op == "expand":
        block = min(max(2048 // width, 4), 256, _power_of_two(hidden))
        return {"BLOCK_N": block, "SPLIT_N": -(-hidden // block), "num_warps": 4}
    if op == "expand_slices":
        step = min(width, 16)
        return {"BLOCK_N": min(2048 // step, 256), "BLOCK_K": step, "num_warps": 4}
    if op in ("shrink", "shrink_slices"):
        return {"BLOCK_N": 2, "BLOCK_K": min(1024, _power_of_two(hidden)), "num_warps": 4}
    if op == "sgmv_shrink":
        return {"BLOCK_M": 32, "BLOCK_N": 16 if width <= 16 else 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": min(max(width, 16), 32), "num_warps": 4, "num_stages": 2}


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()

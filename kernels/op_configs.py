"""Launch configurations of the LoRA kernels: a tuned table for the device where there is one, else defaults.

A table is ``configs/<device name with underscores>.json``::

    {"device": "...", "rows": [{"op": "expand", "hidden": 4096, "rank": 16, "batch": 8,
                                "config": {"BLOCK_N": 128, "SPLIT_N": 32, "num_warps": 4}, "us": 2.1}, ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

CONFIGS_DIR = Path(__file__).parent / "configs"

EXPAND_KEYS = ("BLOCK_N", "SPLIT_N", "num_warps", "num_stages")
EXPAND_SLICES_KEYS = ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
SHRINK_KEYS = ("BLOCK_N", "SPLIT_N", "BLOCK_K", "num_warps", "num_stages")
SHRINK_SLICES_KEYS = ("BLOCK_N",)
SGMV_KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
POWERS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")

_OP_KEYS = {
    "expand": EXPAND_KEYS,
    "expand_shared": (*EXPAND_KEYS, "ROWS"),
    "expand_slices": EXPAND_SLICES_KEYS,
    "shrink": SHRINK_KEYS,
    "shrink_shared": (*SHRINK_KEYS, "ROWS"),
    "shrink_slices": SHRINK_SLICES_KEYS,
    "sgmv_shrink": SGMV_KEYS,
    "sgmv_expand": SGMV_KEYS,
}
# What may differ between the batches of one (hidden, rank): these keys deal work out to programs and leave the order of
# every sum as it is, so that a row's bits do not depend on its batch. sgmv looks up one configuration for all lengths.
# Of expand_slices a tall tile's products may be fused into their sum and a low one's not, so tiles are of one height.
_SPREAD = ("BLOCK_N", "SPLIT_N", "num_stages")
BATCH_KEYS = {"expand": _SPREAD, "shrink": _SPREAD, "expand_slices": ("num_stages",), "shrink_slices": _SPREAD}
# A row serves keys within these factors of its own; beyond them its tiles do not fit, and the defaults do better.
_RANK_REACH, _HIDDEN_REACH = 2, 4
_ALIASES = {"bgmv_expand": "expand", "bgmv_shrink": "shrink"}


def get_lora_op_configs(op_type: str, batch: int, hidden: int, *, rank: int = 16, device: str = "") -> dict[str, int]:
    """Launch parameters of one LoRA kernel.

    Args:
        op_type: ``expand``, ``shrink``, ``expand_shared``, ``shrink_shared``, ``expand_slices``, ``shrink_slices``,
            ``sgmv_expand`` or ``sgmv_shrink`` (``bgmv_expand`` and ``bgmv_shrink`` mean the first two).
        batch: rows (tokens for sgmv).
        hidden: output width for expand, input width for shrink.
        rank: the adapters' rank, or the largest of a mixed batch.
        device: device name as CUDA reports it; by default the current one.

    Returns:
        The row of the device's table that is nearest in rank, then hidden, then batch (by ratio); the defaults of
        :func:`default_config` without a table, and where its nearest row is for another rank or width altogether.

    Raises:
        ValueError: unknown ``op_type``.
    """
    op = _ALIASES.get(op_type, op_type)
    if op not in _OP_KEYS:
        raise ValueError(f"op_type {op_type!r} is unknown; use one of {', '.join(_OP_KEYS)}")
    trial = _TRIALS.get().get(op)
    return dict(trial or _config(op, batch, hidden, rank, device or _current_device()))


_TRIALS: ContextVar[Mapping[str, Mapping[str, int]]] = ContextVar("trials", default=MappingProxyType({}))


@contextmanager
def trial_config(op: str, config: Mapping[str, int]) -> Iterator[None]:
    """Inside, every lookup for ``op`` gives ``config``: how a search over configurations runs a kernel with one."""
    token = _TRIALS.set({**_TRIALS.get(), op: config})
    try:
        yield
    finally:
        _TRIALS.reset(token)


def packed(keys: Sequence[str], override: Mapping[str, int] | None) -> list[int] | None:
    """A caller's override as the integers of ``keys`` in order, 0 for absent: what a torch operator can take."""
    return [override.get(key, 0) for key in keys] if override else None


def unpacked(keys: Sequence[str], values: Sequence[int] | None) -> dict[str, int]:
    """The inverse of :func:`packed`: the keys that were given."""
    return {key: value for key, value in zip(keys, values or (), strict=False) if value}


@lru_cache(maxsize=4096)
def _config(op: str, batch: int, hidden: int, rank: int, device: str) -> MappingProxyType[str, int]:
    rows = [row for row in read_table(CONFIGS_DIR / f"{device.replace(' ', '_')}.json") if row["op"] == op]
    row = nearest(rows, batch, hidden, rank)
    config = default_config(op, hidden, rank) if row is None else dict(row["config"])
    if row is not None and "SPLIT_N" in config:  # the same share of the output for a program
        wanted, tuned = (hidden, row["hidden"]) if op.startswith("expand") else (rank, row["rank"])
        config["SPLIT_N"] = -(-config["SPLIT_N"] * wanted // tuned)
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


def nearest(rows: list[dict[str, Any]], batch: int, hidden: int, rank: int) -> dict[str, Any] | None:
    """The row whose rank, then hidden, then batch is nearest by ratio; None when none is near."""

    def distance(row: dict[str, Any]) -> tuple[float, float, float]:
        pairs = ((rank, row["rank"]), (hidden, row["hidden"]), (max(batch, 1), row["batch"]))
        return tuple(abs(math.log2(want / have)) for want, have in pairs)  # pyright: ignore[reportReturnType]

    best = min(rows, key=distance, default=None)
    if best is None or distance(best)[0] > math.log2(_RANK_REACH) or distance(best)[1] > math.log2(_HIDDEN_REACH):
        return None
    return best


def default_config(op: str, hidden: int, rank: int) -> dict[str, int]:
    """Defaults for a device without a table. None depends on the batch, so a row's bits do not either.

    Chosen on one H100 (Triton 3.6, bf16, Llama-3-8B widths, rank 16 unless said, distinct adapters past the L2);
    microseconds a call in a CUDA graph at batch 1/8/32/64:

    - expand: one tile a program, 1024 to 2048 weights a tile: enough loads in flight for a bandwidth-bound read and
      enough programs for a narrow output. N=4096: 1.7/2.7/3.7/5.3; N=14336: 1.8/3.5/7.4/13.5.
    - expand_slices: rank in steps of 16, so that a mixed batch computes at each adapter's own rank. q|k|v:
      2.0/3.4/5.3/7.9; gate|up: 3.0/5.6/14.7/29.7; q|k|v at rank 64: 3.7/5.4/13.5 at batch 1/8/32.
    - shrink: one or two rank rows a program, so that rank 16 of a single row spreads over many; long inputs take
      one row and more warps (down, 14336 wide: 3.6/6.0/8.5/12.9 against 4.7/6.8/8.9/13.1). q|k|v: 2.5/4.3/7.0/11.6.
    - sgmv_shrink: low tiles of tokens and long steps over the input, four stages deep: enough programs for few tokens,
      enough loads in flight for many. A layer at 64x128 tokens 204 (64 tokens a tile and three stages 213), at 8x256
      87 (92), at 1x128 31 (36).
    - sgmv_expand: the rank in one step to 64 (q|k|v and o at rank 64: 244, in steps of 32 306), and tiles 128 wide for
      it, so that few programs read the same activations. A layer at 64x128 565 (64 wide 605), at 8x256 153 (157), at
      1x128 24 (23). For higher ranks, in steps of 64, 128 columns take every register there is, so those take 64.
    """
    width = _power_of_two(rank)
    if op in ("expand", "expand_shared"):
        block = min(max(4096 // width, 8), 512, _power_of_two(hidden))
        config = {"BLOCK_N": block, "SPLIT_N": -(-hidden // block), "num_warps": 4}
    elif op == "expand_slices":
        config = {"BLOCK_N": 512, "BLOCK_K": min(width, 16), "num_warps": 4}
    elif op == "sgmv_shrink":
        block = min(max(width, 16), 64)
        config = {"BLOCK_M": 32, "BLOCK_N": block, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    elif op == "sgmv_expand":
        step, block = min(max(width, 16), 64), 128 if width <= 64 else 64
        config = {"BLOCK_M": 64, "BLOCK_N": block, "BLOCK_K": step, "num_warps": 4, "num_stages": 1}
    elif op == "shrink_slices":
        config = {"BLOCK_N": 4 if width <= 16 else 8}
    elif hidden > 8192:
        config = {"BLOCK_N": 1, "SPLIT_N": rank, "BLOCK_K": 16384, "num_warps": 16}
    else:
        config = {"BLOCK_N": 2, "SPLIT_N": -(-rank // 2), "BLOCK_K": min(2048, _power_of_two(hidden)), "num_warps": 4}
    return config | ({"ROWS": 2} if op.endswith("_shared") else {})


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()

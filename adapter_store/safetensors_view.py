"""Tensors of a safetensors file that is already in memory, without copying them.

The safetensors library parses a buffer by copying every tensor while it holds the interpreter lock, some 20 ms for an
80 MiB adapter, in which no running request gets its next token. The format (https://huggingface.co/docs/safetensors):
eight bytes of little-endian header length, a JSON header of name -> dtype, shape and offsets, then the data.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard

import torch
from torch import Tensor

#: Element types that adapters may have.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MAX_HEADER_BYTES = 16 << 20


def view_safetensors(data: Tensor) -> dict[str, Tensor]:
    """The tensors of a file, as views of its bytes ``data`` (uint8, 1-D); one that is misaligned is copied.

    Raises ValueError unless the header is sound, every tensor is of one of ``DTYPES``, and the tensors cover the data
    exactly, without holes or overlaps.
    """
    start, header = _header(data)
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        if end > data.numel() - start:
            raise ValueError(f"tensor {name!r} ends at byte {end} of {data.numel() - start}")
        spans.append((begin, end))
        raw = data[start + begin : start + end]
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        tensors[name] = raw.view(dtype).view(shape)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"its tensors leave a hole or overlap at byte {position}")
        position = end
    if position != data.numel() - start:
        raise ValueError(f"it has {data.numel() - start - position} bytes that belong to no tensor")
    return tensors


def _header(data: Tensor) -> tuple[int, dict[str, Any]]:
    if data.numel() < 8:
        raise ValueError(f"it has only {data.numel()} bytes")
    size = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if size > min(_MAX_HEADER_BYTES, data.numel() - 8):
        raise ValueError(f"its header of {size} bytes does not fit")
    try:
        header = json.loads(data[8 : 8 + size].numpy().tobytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return 8 + size, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def _entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"the header's entry of {name!r} is no object")
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"tensor {name!r} is {entry.get('dtype')!r}; only {', '.join(DTYPES)} are read")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise ValueError(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} takes {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)

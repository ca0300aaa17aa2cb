"""Sampling parameters for a batch, as the tests of sampling write them down."""

from __future__ import annotations

import torch
from torch import Tensor


def columns(
    rows: int,
    device: torch.device,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int | list[int] = 0,
    position: int | list[int] | None = None,
) -> list[Tensor]:
    """The parameters as ``sample`` takes them, scalars spread over the rows; positions default to 0, 1, 2 …"""

    def column(value: object, dtype: torch.dtype) -> Tensor:
        values = value if isinstance(value, list) else [value] * rows
        return torch.tensor(values, dtype=dtype, device=device)

    return [
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(list(range(rows)) if position is None else position, torch.int64),
    ]

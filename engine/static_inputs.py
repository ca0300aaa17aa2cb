"""Tensors at fixed addresses that arrays of the same shapes are written into, step after step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from engine.batch import array_views, places, write_arrays


class StaticInputs:
    """One buffer on the device, and two pinned ones on the host that take turns.

    views: name -> tensor of that array's shape and type in the device buffer.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> None:
        """Takes shapes, types and first values from ``arrays``."""
        self._starts, size = places(arrays)
        cuda = device.type == "cuda"
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2 if cuda else 1)]
        self._copied = [torch.cuda.Event() for _ in self._hosts] if cuda else []
        self._turn = 0
        self.views: dict[str, Tensor] = array_views(self._buffer, self._starts, arrays)
        self.fill(arrays)

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy ``arrays`` to the device, in stream order; they may be reused at once."""
        self._turn = (self._turn + 1) % len(self._hosts)
        host = self._hosts[self._turn]
        if self._copied:
            self._copied[self._turn].synchronize()  # of the step before the last: long done
        write_arrays(host, self._starts, arrays)
        self._buffer.copy_(host, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()

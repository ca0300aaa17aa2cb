"""An adapter in host memory, laid out exactly as a slot is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """One adapter as one slab, ready for a single copy into a slot.

    name: what it was first asked for as. digest: its content. rank: the largest rank of its modules.
    slab: (layout.slab_elements(rank),) in the model's dtype, on the CPU, pinned where slots are on a GPU; the scale is
    folded into B. load_seconds: what it took to bring it here from its source.
    """

    name: str
    digest: str
    rank: int
    slab: Tensor
    load_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.slab.numel() * self.slab.element_size()

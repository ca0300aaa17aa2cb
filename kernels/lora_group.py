"""Where one projection group's LoRA weights lie inside a packed adapter."""

from __future__ import annotations

from dataclasses import dataclass

RANK_STEP = 8  # elements: 16 bytes of a 16-bit type, the widest load of a thread
_SPLIT_WIDTH = 2048  # columns of A that one program sums: what 256 threads load at once, 16 bytes each


def packed_rank(rank: int) -> int:
    """The rank at which an adapter of ``rank`` is packed: padded with zeros to whole vectors.

    Every offset is then a multiple of a vector too. A second path for other ranks in the same kernel, even one never
    taken, doubled the registers of the first and with them a decode step's LoRA time (bf16, one H100).
    """
    return -(-rank // RANK_STEP) * RANK_STEP


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """One packed projection group (q|k|v, o, gate|up or down) of one decoder layer.

    An adapter is packed at its own rank, rounded up to r (:func:`packed_rank`), as one contiguous slab, so every offset
    is linear in r and is kept here in units of rank. For a slab that starts at element ``s`` of the arena, a multiple
    of ``RANK_STEP``:

    - A of slice i, ``(r, in_features)`` row-major, starts at ``s + r * a_unit(i)``;
    - B of slice i, ``(out_features[i], r)`` row-major, starts at ``s + r * b_unit(i)``.

    All A blocks come first, so the A of a whole group is one ``(slices * r, in_features)`` matrix.
    """

    unit: int
    in_features: int
    out_features: tuple[int, ...]

    @property
    def slices(self) -> int:
        """Number of packed projections (3 for q|k|v, 2 for gate|up, 1 otherwise)."""
        return len(self.out_features)

    @property
    def out_total(self) -> int:
        """Width of the packed output row: the sum of ``out_features``."""
        return sum(self.out_features)

    @property
    def splits(self) -> int:
        """Partial sums in which the decode shrink leaves ``A @ x``.

        A function of the width alone, so that a row's sum never depends on the batch around it.
        """
        return -(-self.in_features // _SPLIT_WIDTH)

    @property
    def size(self) -> int:
        """Elements of this group per unit of rank."""
        return self.slices * self.in_features + self.out_total

    def a_unit(self, index: int) -> int:
        """Offset of slice ``index``'s A, in units of rank."""
        return self.unit + index * self.in_features

    def b_unit(self, index: int) -> int:
        """Offset of slice ``index``'s B, in units of rank."""
        return self.unit + self.slices * self.in_features + sum(self.out_features[:index])

    def out_start(self, index: int) -> int:
        """First output column of slice ``index`` in the packed output row."""
        return sum(self.out_features[:index])

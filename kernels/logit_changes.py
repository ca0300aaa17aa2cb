"""What some rows ask to be changed in their logits before a token is drawn: penalties, biases, barred tokens.

Whoever asks for it has a *place*, in which the device counts what the row generates. The changed logits are a copy: the
raw ones stay as they are. Rows without a place cost next to nothing. The torch twin is
``kernels.reference_sampling.changed_logits``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import launchable
from kernels.logit_changes_kernel import change_kernel
from kernels.sampling_row import CHUNK


@dataclass(frozen=True, slots=True)
class ChangeState:
    """P places for rows of a vocabulary of V, and up to M masks of a step; all on one device, last dims contiguous."""

    counts: Tensor  # (P, V) int32: twice how often the row generated a token, plus 1 if its prompt holds it
    penalties: Tensor  # (P, 3) fp32: repetition (1 for none), frequency, presence
    bias_ids: Tensor  # (P, B) int32: different tokens, then -1; B is a power of 2
    biases: Tensor  # (P, B) fp32
    masks: Tensor  # (M, ceil(V / 32)) int32: bit t % 32 of word t // 32 is set where token t is allowed
    changed: Tensor  # (P, V) fp32: what a step leaves for its draw

    @classmethod
    def empty(cls, places: int, vocab: int, biases: int, device: torch.device) -> ChangeState:
        """Room for so many places and masks, with so many biases each. Nothing in it means anything yet."""
        return cls(
            counts=torch.zeros((places, vocab), dtype=torch.int32, device=device),
            penalties=torch.zeros((places, 3), dtype=torch.float32, device=device),
            bias_ids=torch.full((places, biases), -1, dtype=torch.int32, device=device),
            biases=torch.zeros((places, biases), dtype=torch.float32, device=device),
            masks=torch.zeros((places, -(-vocab // 32)), dtype=torch.int32, device=device),
            changed=torch.zeros((places, vocab), dtype=torch.float32, device=device),
        )


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """Which rows of a step are changed, and how. A row with a mask has a place; no two rows have the same."""

    state: ChangeState
    places: Tensor  # (rows,) int32: -1 for a row that is left as it is
    mask_rows: Tensor  # (rows,) int32: which mask bars tokens of the row, -1 for none

    def write(self, logits: Tensor) -> None:
        """Leave the changed logits of the rows that have a place in ``state.changed``, by place. Triton only.

        logits: (rows, vocab) fp32, bf16 or fp16, last dim contiguous. In this order: a logit of a token that was seen
        is divided by the repetition penalty where positive and multiplied by it otherwise; the frequency penalty times
        how often it was generated is taken off, and the presence penalty if it was; what the mask does not allow is
        -inf; biases are added. Nothing waits for the device.
        """
        rows, vocab = logits.shape
        state = self.state
        launchable(change_kernel, logits)[(rows, -(-vocab // int(CHUNK)))](
            logits,
            logits.stride(0) if rows > 1 else vocab,
            self.places,
            self.mask_rows,
            state.counts,
            state.penalties,
            state.bias_ids,
            state.biases,
            state.masks,
            state.masks.shape[1],
            state.changed,
            vocab,
            BIASES=state.bias_ids.shape[1],
            num_warps=8,
        )

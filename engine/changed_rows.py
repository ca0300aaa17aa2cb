"""Rows whose logits are changed before they draw: gives them places on the device, and each step its masks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from engine.request import MOST_BIASES
from engine.scheduler import PlannedRow
from engine.sequence import Sequence
from kernels.logit_changes import ChangeState


class ChangedRows:
    """Places for as many rows as run at a time. One thread only.

    A row gets a place when it first draws a token, with all of its tokens known, and has it until the scheduler takes
    it away (``Sequence.place`` is -1 again): at its end, and when it is preempted.

    state: what the kernels read and write, 8 bytes for each place and token of the vocabulary.
    """

    def __init__(self, places: int, vocab_size: int, device: torch.device, *, poison: bool = False) -> None:
        """poison: fill all of it with what no row may ever see."""
        self.state = ChangeState.empty(places, vocab_size, MOST_BIASES, device)
        self._owners: list[Sequence | None] = [None] * places
        self._vocab_size = vocab_size
        self._pinned = device.type == "cuda"
        if poison:
            for values in (self.state.penalties, self.state.biases, self.state.changed):
                values.fill_(math.nan)
            self.state.counts.fill_(2**30 + 1)

    def prepare(self, rows: Iterable[PlannedRow]) -> None:
        """Make the state right for a step in which ``rows`` draw a token; sets their ``place`` and ``mask_row``.

        In the order of the device's stream; nothing waits for it.
        """
        masks: list[np.ndarray] = []
        for row in rows:
            sequence = row.sequence
            if sequence.plain:
                continue
            mask = self._mask(sequence)
            sequence.mask_row = -1
            if mask is not None:
                sequence.mask_row = len(masks)
                masks.append(mask)
            elif not sequence.request.sampling.penalised and not sequence.request.sampling.logit_bias:
                sequence.place = -1
                continue
            if sequence.place < 0:
                self._open(sequence)
        if masks:
            self._write(self.state.masks[: len(masks)], np.stack(masks))

    def _mask(self, sequence: Sequence) -> np.ndarray | None:
        """(words,) int32 of what the next token may be; None for any."""
        grammar, params = sequence.grammar, sequence.request.sampling
        words = self.state.masks.shape[1]
        mask = None if grammar is None else grammar.mask[:words]  # the tokenizer's may be wider than the logits
        if len(sequence.tokens) - sequence.prompt_tokens < params.min_tokens:
            longer = np.full(words, -1, np.int32) if mask is None else mask.copy()
            bits = longer.view(np.uint32)
            for token in sequence.end_tokens:
                bits[token // 32] &= ~np.uint32(1 << token % 32)
            if grammar is None or bits.any():  # a grammar that allows nothing but the end has its way
                mask = longer
        return mask

    def _open(self, sequence: Sequence) -> None:
        """Give it a place and write what the place must hold."""
        place = next(place for place, owner in enumerate(self._owners) if owner is None or owner.place != place)
        self._owners[place], sequence.place = sequence, place
        state, params = self.state, sequence.request.sampling
        penalties = [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]
        self._write(state.penalties[place], np.array(penalties, np.float32))
        if params.penalised:
            assert sequence.known == len(sequence.tokens)
            prompt, generated = np.split(np.array(sequence.tokens, np.int64), [sequence.prompt_tokens])
            counts = 2 * np.bincount(generated, minlength=self._vocab_size)
            counts[prompt] += 1  # once for each token, however often it is there
            self._write(state.counts[place], counts.astype(np.int32))
        tokens = np.full(MOST_BIASES, -1, np.int32)
        biases = np.zeros(MOST_BIASES, np.float32)
        for entry, (token, bias) in enumerate(params.logit_bias):
            tokens[entry], biases[entry] = token, bias
        self._write(state.bias_ids[place], tokens)
        self._write(state.biases[place], biases)

    def _write(self, target: torch.Tensor, values: np.ndarray) -> None:
        if not self._pinned:
            target.copy_(torch.from_numpy(values))
            return
        # Fresh memory: torch keeps it from being used again before the copy has read it.
        host = torch.empty(values.shape, dtype=target.dtype, pin_memory=True)
        host.numpy()[...] = values
        target.copy_(host, non_blocking=True)

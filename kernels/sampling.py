"""Choosing the next token: temperature, top-k, top-p, min-p and a draw that can be repeated.

A draw is the Gumbel-max trick: the kept token whose scaled logit plus Gumbel noise is largest. The noise of
token t is a pure function of (seed, position, t), from the counter-based generator Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011). No state is carried, so a row's token depends on its own
seed, position and logits only: not on the batch around it, the device, or what was drawn before.

With Triton nothing is sorted: a threshold is found by counting (``kernels.sampling_kernels``), launches are sized by
shapes alone and nothing waits for the device, so with all parameters on the device the calls can be captured in a CUDA
graph. The torch twin is ``kernels.reference_sampling``. Kernel and twin keep the same top-k and min-p sets exactly. In
top-p a token stays where the mass before it is below p; masses are fp32 sums in a fixed order, good to 1e-5, so a
token whose mass before it comes that close to p may fall on either side. Of what is kept both draw the same token:
scores are compared in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference_sampling
from kernels.dispatch import launchable, triton, use_triton
from kernels.logit_changes import LogitChanges
from kernels.reference_sampling import gumbel_noise, philox4x32
from kernels.sampling_kernels import chunk_kernel, draw_kernel, finish_kernel, splitters_kernel
from kernels.sampling_row import CHUNK, CHUNKS, WORDS_PER_CHUNK
from kernels.sampling_threshold import threshold_kernel

__all__ = ["gumbel_noise", "log_probs", "philox4x32", "sample", "sample_with_logprob"]

_BIN_CAPACITY = 32768  # tokens; bins hold 12 000 at most in the mean, a quarter of that in the deviation


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """One token id per row, (rows,) int64: the first result of :func:`sample_with_logprob`."""
    return sample_with_logprob(logits, temperature, top_k, top_p, min_p, seed, position)[0]


def sample_with_logprob(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    changes: LogitChanges | None = None,
) -> tuple[Tensor, Tensor]:
    """One token id per row, (rows,) int64, and its natural-log probability (rows,) fp32, on the logits' device.

    The probability is that of the raw logits, before temperature, any filter and any change. It is NaN exactly where
    the row's logits hold NaN or +inf, or nothing but -inf, as they are or as changed: the token is then of no use.

    logits: (rows, vocab) fp32, bf16 or fp16, last dim contiguous; -inf bars a token. The others are (rows,):
    temperature float, 0 takes the likeliest token (the lowest id among equals);
    top_k int, 0 keeps all; exactly k are kept, the lower id first among equals;
    top_p float, keeps the likeliest tokens until their mass, after temperature and top-k, reaches p; 1 keeps all;
    min_p float, drops tokens less likely than min_p times the likeliest; 0 keeps all;
    seed int64, all 64 bits count; position int64, that of the token to be drawn.
    changes: what is done to the logits first; tokens that such rows draw are counted in its state.

    The parameters may lie on the CPU while the logits lie on a GPU: then nothing waits for the device.
    Raises ValueError when a parameter has another shape than (rows,) or a row is not contiguous.
    """
    rows = logits.shape[0]
    parameters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "position": position,
    }
    for name, values in parameters.items():
        if values.shape != (rows,):
            raise ValueError(f"{name} is {tuple(values.shape)} but logits have {rows} rows: pass ({rows},)")
    if logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}; the last dim must be contiguous")
    if changes is not None and not changes.places.shape == changes.mask_rows.shape == (rows,):
        raise ValueError(f"changes are of {changes.places.shape[0]} rows but logits have {rows}")
    if not use_triton(logits):
        return reference_sampling.sample_with_logprob(logits, *parameters.values(), changes=changes)
    on_device = (values.to(logits.device, non_blocking=True).contiguous() for values in parameters.values())
    return _Draw(logits, *on_device, changes=changes).run()


def log_probs(logits: Tensor, token_ids: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities of the raw logits, before temperature and any filter.

    logits: (rows, vocab) fp32, bf16 or fp16; token_ids: (rows,) int64. Returns the chosen tokens' (rows,) fp32, and
    the ``top_n`` likeliest: ids (rows, top_n) int64 and values (rows, top_n) fp32, likeliest first, lower id first
    among equals. Nothing waits for the device.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    chosen = values.gather(1, token_ids[:, None]).squeeze(1)
    top, ids = values.topk(min(top_n, logits.shape[1]), dim=-1)
    ids, by_id = ids.sort(dim=-1)
    top, by_value = top.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return chosen, ids.gather(1, by_value), top


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Warps of a launch, and tokens that a block of ``threshold_kernel`` takes at once: to copy a bin, to search it."""

    chunk_warps: int = 8
    threshold_warps: int = 16
    copy: int = 4096
    search: int = 2048
    draw_warps: int = 8


_TILES = _Tiles()


class _Draw:
    """The launches for one batch, in their order, and the workspace through which they pass results on."""

    def __init__(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        position: Tensor,
        *,
        changes: LogitChanges | None = None,
        tiles: _Tiles = _TILES,
    ) -> None:
        self.rows, self.vocab = logits.shape
        self.chunks = -(-self.vocab // int(CHUNK))
        # At least 32, so that usual vocabularies share their compiled kernels.
        block_c = max(32, int(triton.next_power_of_2(self.chunks)))
        width = int(CHUNKS) + int(WORDS_PER_CHUNK) * block_c
        self.ints = torch.empty((self.rows, width), dtype=torch.int32, device=logits.device)
        self.tokens = torch.empty(self.rows, dtype=torch.int64, device=logits.device)
        self.logprobs = torch.empty(self.rows, dtype=torch.float32, device=logits.device)
        floats = self.ints.view(torch.float32)
        # A single row's stride is of no meaning, and must not decide how the kernels are compiled.
        row_stride = logits.stride(0) if self.rows > 1 else self.vocab
        self._filtered = (logits, row_stride, temperature, top_k, top_p)
        self._min_p = min_p
        self._random = (logits, row_stride, temperature, seed, position, self.ints, floats)
        self._workspace = (self.ints, floats)
        self._changes = changes
        # Without changes nothing is read of what stands in for them.
        self._counts = self.ints if changes is None else changes.state.counts
        places, changed = (self.ints, floats) if changes is None else (changes.places, changes.state.changed)
        self._source = (places, changed)
        self._given = {"WIDTH": width, "BLOCK_C": block_c, "CHANGED": changes is not None}
        self._tiles = tiles

    def run(self) -> tuple[Tensor, Tensor]:
        """Tokens and log probabilities."""
        if self.rows:
            if self._changes is not None:
                self._changes.write(self._filtered[0])
            self.mark()
            self.scan()
            self.cut()
            self.draw()
            self.finish()
        return self.tokens, self.logprobs

    def mark(self) -> None:
        """Marks for the rows that are filtered."""
        self._launch(splitters_kernel, *self._filtered, self.ints, self.vocab, warps=8, WIDTH=self._given["WIDTH"])

    def scan(self) -> None:
        """Chunk by chunk: maximum, sum of exponentials, and what lies above each mark."""
        warps = self._tiles.chunk_warps
        self._launch(
            chunk_kernel, *self._filtered, *self._workspace, *self._source, self.vocab, warps=warps, **self._given
        )

    def cut(self, capacity: int = _BIN_CAPACITY) -> None:
        """The threshold of each row, LOWEST and LAST. capacity: tokens of a bin that can be copied out of its row."""
        capacity = min(capacity, self.vocab)
        logits = self._filtered[0]
        copied = torch.empty((self.rows, capacity), dtype=torch.float32, device=logits.device)
        ids = torch.empty((self.rows, capacity), dtype=torch.int32, device=logits.device)
        self._launch(
            threshold_kernel,
            *self._filtered,
            self._min_p,
            *self._workspace,
            copied,
            ids,
            capacity,
            *self._source,
            self.vocab,
            warps=self._tiles.threshold_warps,
            GATHER=self._tiles.copy,
            TILE=self._tiles.search,
            **self._given,
        )

    def draw(self) -> None:
        """The winner of each chunk."""
        self._launch(draw_kernel, *self._random, *self._source, self.vocab, warps=self._tiles.draw_warps, **self._given)

    def finish(self) -> None:
        """The winner of each row and its log probability."""
        results = (self.tokens, self.logprobs, *self._source, self._counts)
        self._launch(finish_kernel, *self._random, *results, self.vocab, warps=1, **self._given)

    def _launch(self, kernel: Any, *arguments: Any, warps: int, **constants: int) -> None:
        grid = (self.rows, self.chunks) if kernel in (chunk_kernel, draw_kernel) else (self.rows,)
        launchable(kernel, self.ints)[grid](*arguments, num_warps=warps, **constants)

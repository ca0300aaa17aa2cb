"""Prefill and the fused steps, which may start while the kernel before them runs, keep the order of their stream.

So do the kernels of decode between them, which are launched plainly: all of one has ended when the next begins.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_decode, paged_prefill
from kernels.dispatch import gdc_launch_dependents, gdc_wait, jit, launchable, overlap, tl, triton
from kernels.fused import residual_rms_norm, rope_write_kv, silu_mul

LAYERS, ROWS, DECODING, HEADS, KV_HEADS, HEAD_DIM, PAGE, PAGES = 3, 48, 32, 8, 2, 64, 16, 45
Q_SIZE, QKV_SIZE = HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM


@jit
def _slow_copy_kernel(source, target, count, turns, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    """Lets its successor start at once, then takes its time before it writes."""
    if WAIT == "first":
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + place, mask=place < count, other=0.0)
    for _ in range(turns):
        values = tl.load(source + place, mask=place < count, other=0.0, volatile=True)
    tl.store(target + place, values, mask=place < count)


def slow_copy(source: Tensor, target: Tensor) -> None:
    """``target.copy_(source)``, but on a GPU not before some tens of microseconds have passed."""
    turns = 500 if source.is_cuda else 1
    launchable(_slow_copy_kernel, source)[(triton.cdiv(source.numel(), 1024),)](
        source, target, source.numel(), turns, BLOCK=1024, **overlap(source)
    )


class Chain:
    """Layers of attention and elementwise steps, each behind slow writers of what it reads.

    The first rows decode, the others have one query of a prefill each. The residual is written five launches before
    it is read, and every layer overwrites what the one before it has read.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, torch.bfloat16)

        table = torch.randperm(ROWS * PAGES).view(ROWS, PAGES)
        lens = torch.randint(1, longest + 1, (ROWS,))
        lens[[3, 11]] = 0  # padding
        last = (lens - 1).clamp(min=0)
        slots = table[torch.arange(ROWS), last // PAGE] * PAGE + last % PAGE
        self.positions = last.to(device)
        self.slots = torch.where(lens > 0, slots, -1).to(device)
        self.table, self.lens = table.int().to(device), lens.int().to(device)
        self.starts = torch.arange(DECODING, ROWS + 1, dtype=torch.int32, device=device)
        self.cos_sin = torch.randn(PAGES * PAGE, HEAD_DIM).to(device)
        self.weights = random(LAYERS, Q_SIZE)
        self.old_caches = random(2, ROWS * PAGES, PAGE, KV_HEADS, HEAD_DIM)
        self.sources, self.residuals = random(LAYERS, ROWS, QKV_SIZE), random(LAYERS, ROWS, Q_SIZE)
        self.caches = self.old_caches.clone()
        self.qkv, self.residual = random(ROWS, QKV_SIZE), random(ROWS, Q_SIZE)
        self.attended, self.normed = random(ROWS, Q_SIZE), random(ROWS, Q_SIZE)
        self.gated = random(LAYERS, ROWS, Q_SIZE // 2)

    def written(self) -> tuple[Tensor, ...]:
        return self.caches, self.qkv, self.residual, self.attended, self.normed, self.gated

    def spoil(self) -> None:
        """What was written is gone, and what comes next is new: nothing of an earlier run can pass for a result."""
        for tensor in (self.qkv, self.residual, self.attended, self.normed, self.gated):
            tensor.fill_(torch.nan)
        self.caches.copy_(self.old_caches)
        self.caches.flatten(1, 2)[:, self.slots[self.slots >= 0]] = torch.nan

    def run(self, after_each: Callable[[], object] = lambda: None) -> None:
        keys, values = self.caches
        q = self.qkv[:, :Q_SIZE].unflatten(1, (HEADS, HEAD_DIM))
        out = self.attended.view(q.shape)
        decoded, decode_rows = out[:DECODING], (self.table[:DECODING], self.lens[:DECODING])
        prefill_rows = (self.table[DECODING:], self.starts, self.lens[DECODING:])
        for source, residual, weight, gated in zip(self.sources, self.residuals, self.weights, self.gated, strict=True):
            slow_copy(residual, self.residual)
            after_each()
            slow_copy(source, self.qkv)
            after_each()
            rope_write_kv(self.qkv, self.cos_sin, self.positions, self.slots, keys, values, HEADS)
            after_each()
            paged_decode(q[:DECODING], keys, values, *decode_rows, decoded, 0.125)
            after_each()
            paged_prefill(q, keys, values, *prefill_rows, out, 0.125, 1)
            after_each()
            residual_rms_norm(self.attended, self.residual, weight, 1e-5, self.normed, operands_ready=True)
            after_each()
            silu_mul(self.normed, gated)
            after_each()


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [PAGES * PAGE, 200])
def test_overlapped_launches_give_the_bits_of_synchronised_ones(device: torch.device, longest: int) -> None:
    """In a CUDA graph and one by one. With 200 keys no row has splits, and the combine has nothing to do."""
    chain = Chain(device, longest)
    chain.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run()
    for _ in range(5):
        chain.sources.normal_()
        chain.residuals.normal_()
        chain.spoil()
        chain.run(torch.cuda.synchronize)
        expected = [tensor.clone() for tensor in chain.written()]
        assert not any(tensor.isnan().any() for tensor in expected)
        for overlapped in (graph.replay, chain.run):
            chain.spoil()
            torch.cuda.synchronize()
            overlapped()
            for got, wanted in zip(chain.written(), expected, strict=True):
                assert torch.equal(got, wanted)

"""The table that ships for this GPU: a row's bits are the same at every batch that the table knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import op_configs
from kernels.bgmv_expand import bgmv_expand, bgmv_expand_slices
from kernels.bgmv_shrink import bgmv_shrink, bgmv_shrink_slices
from kernels.lora_group import LoraGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def outputs(op: str, hidden: int, rank: int, batch: int) -> Tensor:
    """What the kernel gives for the first ``batch`` of one set of rows, each with an adapter of its own."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)

    index = torch.arange(batch, dtype=torch.int32, device="cuda")
    shrinks = op.startswith("shrink")
    group = LoraGroup(0, hidden if shrinks else 256, (256 if shrinks else hidden,))
    arena = normal(16 * rank * group.size)
    table = torch.tensor([[slot % 16 * rank * group.size, rank] for slot in range(1024)], device="cuda")
    wide, narrow = normal(1024, hidden)[:batch], normal(1024, rank, dtype=torch.float32)[:batch]
    weights = arena[: 16 * hidden * rank].view(16, *((rank, hidden) if shrinks else (hidden, rank)))
    out = torch.zeros(batch, rank if shrinks else hidden, dtype=torch.float32, device="cuda")
    match op:
        case "expand":
            bgmv_expand(narrow, weights, out, index % 16)
        case "shrink":
            bgmv_shrink(wide, weights, out, index % 16)
        case "expand_slices":
            bgmv_expand_slices(
                narrow.expand(group.splits, 1, batch, rank).contiguous(), arena, table, out, index, group
            )
        case _:
            out = torch.zeros(group.splits, 1, batch, rank, device="cuda")
            bgmv_shrink_slices(wide, arena, table, out, index, group)
            out = out.movedim(2, 0)
    return out


def test_bits_do_not_depend_on_the_batch() -> None:
    name = torch.cuda.get_device_name().replace(" ", "_")
    batches: dict[tuple[str, int, int], set[int]] = {}
    for row in op_configs.read_table(op_configs.CONFIGS_DIR / f"{name}.json"):
        if row["op"] in op_configs.BATCH_KEYS:
            batches.setdefault((row["op"], row["hidden"], row["rank"]), set()).add(row["batch"])
    if not batches:
        pytest.skip(f"no table for decode kernels on {name}")
    differ: list[tuple[tuple[str, int, int], int]] = []
    for key, sizes in batches.items():
        largest = outputs(*key, max(sizes))
        differ += [(key, batch) for batch in sizes if not torch.equal(outputs(*key, batch), largest[:batch])]
    assert not differ

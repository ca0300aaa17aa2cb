"""Time of each kernel beside the time its bytes take, and beside other ways to compute the same.

    python -m benchmarks.kernels --ops expand,shrink --batch 1,8,32,64 --rank 16 --hidden 1024,4096,14336

Every step of a timed run reads adapters that the steps before it did not, until the weights are larger than the L2.
``floor_us`` is the bytes that must move over the copy bandwidth measured in the same run. Rivals: ``gather`` (index
the adapters, then bmm), ``loop`` (one product an adapter), and ``--rival module:function``, called as ``bgmv_expand``.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapter_store.layout import AdapterLayout
from benchmarks.report import Report, Row, device_name
from benchmarks.synthetic import SHAPES
from benchmarks.timing import copy_bandwidth, step_us
from engine.lora_targets import adapter_layout
from engine.spec import ModelSpec
from kernels.attention import paged_decode
from kernels.bgmv_expand import bgmv_expand, bgmv_expand_slices
from kernels.bgmv_shrink import bgmv_shrink_slices
from kernels.fused import residual_rms_norm, silu_mul

STEPS = 40
Expand = Callable[..., object]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cases of a run share. weights_bytes: size of the pool that the steps draw their adapters from."""

    device: torch.device
    dtype: torch.dtype
    weights_bytes: int
    bandwidth: float

    def row(self, kernel: str, hidden: int, rank: int, batch: int, dist: str, us: float, moved: int) -> Row:
        """A result row; ``moved`` is the bytes that the step cannot but read and write."""
        floor = moved / self.bandwidth * 1e6
        return {
            "kernel": kernel,
            "hidden": hidden,
            "rank": rank,
            "batch": batch,
            "dist": dist,
            "us": us,
            "bytes": moved,
            "floor_us": floor,
            "us/floor": us / floor,
        }


def indices(step: int, batch: int, adapters: int, dist: str, device: torch.device) -> Tensor:
    """Adapters of one step: all different, or all the same; other ones in every step."""
    first = step * batch if dist == "distinct" else step
    stride = 1 if dist == "distinct" else 0
    return ((first + stride * torch.arange(batch)) % adapters).to(device, torch.int32)


def gather_bmm(inputs: Tensor, weights: Tensor, output: Tensor, index: Tensor) -> None:
    """Index every row's adapter, then one batched product."""
    output += torch.bmm(weights[index.long()], inputs.to(weights.dtype)[:, :, None])[:, :, 0]


def expand_cases(
    setting: Setting, hidden: int, rank: int, batch: int, dist: str, rival: Expand | None
) -> Iterator[Row]:
    """``bgmv_expand`` on stacked adapters, and its rivals."""
    element = setting.dtype.itemsize
    adapters = max(batch, min(4096, setting.weights_bytes // (hidden * rank * element)))
    weights = torch.randn(adapters, hidden, rank, device=setting.device).to(setting.dtype)
    inputs = torch.randn(batch, rank, device=setting.device)
    output = torch.zeros(batch, hidden, dtype=setting.dtype, device=setting.device)
    chosen = [indices(step, batch, adapters, dist, setting.device) for step in range(STEPS)]
    distinct = batch if dist == "distinct" else 1
    moved = distinct * hidden * rank * element + 2 * batch * hidden * element + batch * rank * 4
    ways: dict[str, Callable[[int], object]] = {
        "bgmv_expand": lambda step: bgmv_expand(inputs, weights, output, chosen[step]),
        "gather": lambda step: gather_bmm(inputs, weights, output, chosen[step]),
    }
    if setting.device.type == "cuda":  # the loop needs the adapters on the host, as an engine would have them
        on_host = [index.tolist() for index in chosen]

        def loop(step: int) -> None:
            for row, adapter in enumerate(on_host[step]):
                output[row] += weights[adapter] @ inputs[row].to(setting.dtype)

        ways["loop"] = loop
    if rival is not None:
        ways["rival"] = lambda step: rival(inputs, weights, output, chosen[step], True)
    for name, way in ways.items():
        yield setting.row(name, hidden, rank, batch, dist, step_us(way, setting.device, STEPS), moved)


def group_cases(setting: Setting, layout: AdapterLayout, rank: int, batch: int, dist: str, op: str) -> Iterator[Row]:
    """The packed shrink or expand of each projection group of one layer, adapters packed as in the slots."""
    element = setting.dtype.itemsize
    # One layer is enough: what a step reads lies in one piece whatever else the slab holds.
    one_layer = AdapterLayout(layout.base_model, 1, layout.groups)
    size = rank * one_layer.units
    adapters = max(batch, min(1024, setting.weights_bytes // (size * element)))
    arena = torch.randn(adapters * size, device=setting.device).to(setting.dtype)
    table = torch.tensor([[slot * size, rank] for slot in range(adapters)], device=setting.device)
    chosen = [indices(step, batch, adapters, dist, setting.device) for step in range(STEPS)]
    distinct = batch if dist == "distinct" else 1
    for name, group in one_layer.lora_groups(0).items():
        x = torch.randn(batch, group.in_features, device=setting.device).to(setting.dtype)
        shrunk = torch.randn(group.slices, batch, rank, device=setting.device)
        out = torch.zeros(batch, group.out_total, dtype=setting.dtype, device=setting.device)
        if op == "shrink":
            width, moved = group.slices * group.in_features, x.nbytes + shrunk.nbytes

            def step(index: int) -> None:
                bgmv_shrink_slices(x, arena, table, shrunk, chosen[index], group)  # noqa: B023 - called in this turn
        else:
            width, moved = group.out_total, shrunk.nbytes + 2 * out.nbytes

            def step(index: int) -> None:
                bgmv_expand_slices(shrunk, arena, table, out, chosen[index], group)  # noqa: B023

        moved += distinct * rank * width * element
        us = step_us(step, setting.device, STEPS)
        yield setting.row(f"{op} {name}", width, rank, batch, dist, us, moved)


def attention_case(setting: Setting, spec: ModelSpec, batch: int, context: int) -> Row:
    """``paged_decode`` of one layer with every row at the same context length and permuted pages."""
    page, pages_each = 16, -(-context // 16)
    total = batch * pages_each
    shape = (total, page, spec.num_kv_heads, spec.head_dim)
    keys = torch.randn(shape, dtype=setting.dtype, device=setting.device)
    values = torch.randn(shape, dtype=setting.dtype, device=setting.device)
    table = torch.randperm(total, device=setting.device).view(batch, pages_each).to(torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=setting.device)
    q = torch.randn(batch, spec.num_heads, spec.head_dim, device=setting.device).to(setting.dtype)
    out = torch.empty_like(q)
    scale = spec.head_dim**-0.5
    us = step_us(lambda _: paged_decode(q, keys, values, table, lengths, out, scale), setting.device, 10)
    moved = 2 * batch * context * spec.num_kv_heads * spec.head_dim * setting.dtype.itemsize + q.nbytes + out.nbytes
    return setting.row(f"paged_decode {context}", spec.num_heads * spec.head_dim, 0, batch, "-", us, moved)


def fused_cases(setting: Setting, spec: ModelSpec, tokens: int) -> Iterator[Row]:
    """Residual + RMSNorm and silu·mul."""
    x = torch.randn(tokens, spec.hidden_size, device=setting.device).to(setting.dtype)
    residual, out = torch.randn_like(x), torch.empty_like(x)
    weight = torch.ones(spec.hidden_size, dtype=setting.dtype, device=setting.device)
    us = step_us(lambda _: residual_rms_norm(x, residual, weight, 1e-5, out), setting.device)
    yield setting.row("residual_rms_norm", spec.hidden_size, 0, tokens, "-", us, 4 * x.nbytes)
    gate_up = torch.randn(tokens, 2 * spec.intermediate_size, device=setting.device).to(setting.dtype)
    product = torch.empty(tokens, spec.intermediate_size, dtype=setting.dtype, device=setting.device)
    us = step_us(lambda _: silu_mul(gate_up, product), setting.device)
    yield setting.row("silu_mul", spec.intermediate_size, 0, tokens, "-", us, gate_up.nbytes + product.nbytes)


def run(arguments: argparse.Namespace) -> Report:
    """All chosen cases, each printed as it comes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights_bytes = (256 if device.type == "cuda" else 32) << 20  # five times an H100's L2
    setting = Setting(device, torch.bfloat16, weights_bytes, copy_bandwidth(device))
    spec = ModelSpec.from_config(SHAPES[arguments.shape], arguments.shape)
    rival: Expand | None = None
    if arguments.rival:
        module, _, function = arguments.rival.partition(":")
        rival = getattr(importlib.import_module(module), function)
    rows: list[Row] = []

    def keep(cases: Iterator[Row]) -> None:
        for row in cases:
            rows.append(row)
            print(json.dumps(row), flush=True)

    for op in arguments.ops:
        for batch in arguments.batch:
            for rank in arguments.rank:
                for dist in arguments.dist if op in {"expand", "groups"} else ():
                    if op == "expand":
                        for hidden in arguments.hidden:
                            keep(expand_cases(setting, hidden, rank, batch, dist, rival))
                    else:
                        for half in ("shrink", "expand"):
                            keep(group_cases(setting, adapter_layout(spec), rank, batch, dist, half))
            if op == "attention":
                keep(attention_case(setting, spec, batch, context) for context in arguments.context)
            if op == "fused":
                keep(fused_cases(setting, spec, batch))
    return Report("kernels", device_name(device), rows)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"--ops": ["expand", "groups", "attention", "fused"], "--dist": ["distinct", "identical"]}
    for name, choices in known.items():
        text = f"of {', '.join(choices)}, comma separated"
        parser.add_argument(name, type=lambda value: value.split(","), default=choices, help=text)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b", help="model of the packed groups")
    parser.add_argument("--batch", type=_numbers, default=[1, 8, 32, 64])
    parser.add_argument("--rank", type=_numbers, default=[16])
    parser.add_argument("--hidden", type=_numbers, default=[1024, 4096, 14336], help="widths of bgmv_expand")
    parser.add_argument("--context", type=_numbers, default=[1024, 4096], help="of attention")
    parser.add_argument("--rival", metavar="MODULE:FUNCTION", help="also time this in place of bgmv_expand")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    for name, choices in known.items():
        if unknown := set(getattr(arguments, name[2:])) - set(choices):
            parser.error(f"{name} {', '.join(sorted(unknown))}: choose from {', '.join(choices)}")
    run(arguments).write(arguments.json)


if __name__ == "__main__":
    main()

"""Kernel results drawn: times over the bytes that must move, a roofline, and what LoRA adds to a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot.picture import new_picture

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """Kernels that share a mark. starts: how their names begin. Colours: Okabe and Ito's, told apart by most eyes."""

    label: str
    starts: tuple[str, ...]
    color: str
    marker: str


FAMILIES = (
    Family("LoRA A, decode", ("bgmv_shrink",), "#0072B2", "o"),
    Family("LoRA B, decode", ("bgmv_expand",), "#D55E00", "s"),
    Family("LoRA, prefill", ("sgmv",), "#009E73", "^"),
    Family("attention, decode", ("paged_decode",), "#CC79A7", "D"),
    Family("attention, prefill", ("paged_prefill",), "#E69F00", "v"),
    Family("norm, rope, silu", ("residual_rms_norm", "rope_write_kv", "silu_mul"), "#56B4E9", "P"),
    Family("sampling", ("sample",), "#000000", "X"),
    Family("all LoRA of a step", ("lora_step",), "#8A6D00", "*"),
)


class KernelResults:
    """A result file of ``benchmarks.kernels``, ready to draw.

    Raises ValueError for a file of another benchmark.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        rows: list[Row] = content.get("rows", [])
        ceilings = {row["kernel"]: row for row in rows if row.get("kernel") in ("copy", "matmul", "empty")}
        if content.get("benchmark") != "kernels" or "copy" not in ceilings or "matmul" not in ceilings:
            raise ValueError("not a result of benchmarks.kernels: its rows must include copy and matmul")
        self.title = f"{content['device']} · {content['date']}"
        self.steps = [row for row in rows if row["kernel"] == "lora_step"]
        self.rows = [row for row in rows if row.get("bytes") and row.get("floor_us") and row["us"] > 0]
        self.bandwidth = ceilings["copy"]["bytes"] / ceilings["copy"]["us"]  # bytes a microsecond
        self.matmul = ceilings["matmul"]["flops"] / ceilings["matmul"]["us"]

    def draw(self) -> Figure:
        """The figure: time over bytes; the roofline; and, where a step was measured, what LoRA adds to it."""
        decode = self.steps
        with new_picture(3 if decode else 2, f"LoRAFleet kernels, {self.title}") as (figure, axes):
            self._times(axes[0])
            self._roofline(axes[1])
            if decode:
                self._steps(axes[2], decode)
        return figure

    def _times(self, axes: Axes) -> None:
        drawn = [self._scatter(axes, family, lambda row: (row["bytes"], row["us"])) for family in FAMILIES]
        if any(drawn):
            low, high = (reduce([row["bytes"] for row in self.rows]) for reduce in (min, max))
            span = np.geomspace(low, high, 200)
            floor = span / self.bandwidth
            axes.plot(span, floor, color="#555555", label=f"copy, {self.bandwidth / 1e6:.2f} TB/s")
            axes.plot(span, 1.9 + 1.05 * floor, color="#555555", linestyle="--", label="1.9 µs + 1.05 × copy")
            shortest, longest = (reduce([row["us"] for row in self.rows]) for reduce in (min, max))
            axes.set_ylim(shortest / 2, longest * 2)
        axes.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="µs", title="Time over bytes")
        axes.legend(frameon=False)

    def _roofline(self, axes: Axes) -> None:
        work = [row for row in self.rows if row.get("flops")]
        for family in FAMILIES:
            self._scatter(axes, family, lambda row: (row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e6), work)
        intensity = [row["flops"] / row["bytes"] for row in work] or [1.0]
        span = np.geomspace(min(intensity) / 2, max(*intensity, 2 * self.matmul / self.bandwidth), 200)
        roof = np.minimum(span * self.bandwidth, self.matmul) / 1e6
        axes.plot(span, roof, color="#555555", label=f"copy and matmul, {self.matmul / 1e6:.0f} TFLOP/s")
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title="Roofline")
        axes.legend(frameon=False, loc="lower right")

    def _steps(self, axes: Axes, decode: list[Row]) -> None:
        batches = sorted({row["batch"] for row in decode})
        dists = list(dict.fromkeys(row["dist"] for row in decode))
        width = 0.8 / len(dists)
        for number, dist in enumerate(dists):
            mine = {row["batch"]: row for row in decode if row["dist"] == dist}
            places = [batches.index(batch) + (number - (len(dists) - 1) / 2) * width for batch in mine]
            axes.bar(
                places, [row["added_ms"] for row in mine.values()], width, label=dist, color=FAMILIES[number].color
            )
            for place, row in zip(places, mine.values(), strict=True):
                for value, style in ((row["floor_us"], "-"), (row["limit_us"], ":")):
                    if value:
                        axes.plot([place - width / 2, place + width / 2], [value / 1e3] * 2, style, color="black")
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(xlabel="batch", ylabel="ms added", title="LoRA in a decode step (— adapter bytes, ··· limit)")
        axes.legend(frameon=False)

    def _scatter(self, axes: Axes, family: Family, point: Any, rows: list[Row] | None = None) -> bool:
        mine = [row for row in (self.rows if rows is None else rows) if row["kernel"].startswith(family.starts)]
        if mine:
            x, y = zip(*(point(row) for row in mine), strict=True)
            size = 90 if family.marker == "*" else 26
            style = {"marker": family.marker, "alpha": 0.85, "edgecolors": "white", "linewidths": 0.5}
            axes.scatter(x, y, size, family.color, label=family.label, **style)  # the rim parts marks that overlap
        return bool(mine)

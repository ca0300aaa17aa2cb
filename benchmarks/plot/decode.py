"""Decode results drawn: throughput against batch, with the byte floor above it and other engines beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.common.distributions import DISTRIBUTIONS
from benchmarks.plot.picture import COLORS, NEUTRAL, new_picture

Row = dict[str, Any]
_MARKERS = "sD^vPX"


class DecodeResults:
    """A result file of ``benchmarks.decode`` and rows of rivals by name, ready to draw.

    Raises ValueError for a file without rows of whole batches, and for a rival without any in the same form.
    """

    def __init__(self, content: dict[str, Any], rivals: Mapping[str, Sequence[Row]] | None = None) -> None:
        self.rows = _batch_rows(content.get("rows", []))
        if content.get("benchmark") != "decode" or not self.rows:
            raise ValueError("not a result of benchmarks.decode with rows of whole batches")
        self.rivals = {name: _batch_rows(rows) for name, rows in (rivals or {}).items()}
        if empty := [name for name, rows in self.rivals.items() if not rows]:
            raise ValueError(
                f"rival {', '.join(empty)}: no row has mode (of {', '.join(DISTRIBUTIONS)}), batch and tok_s"
            )
        self.title = f"{content['device']} · {content['date']}"

    def draw(self) -> Figure:
        """The figure: tokens a second over batch, a line for each mode of each engine."""
        with new_picture(1, f"Decode, {self.title}") as (figure, (axes,)):
            self._floor(axes)
            self._lines(axes, "LoRAFleet", self.rows, "o", "-", 0)
            for number, (name, rows) in enumerate(self.rivals.items()):
                self._lines(axes, name, rows, _MARKERS[number % len(_MARKERS)], "--", number + 1)
            batches = sorted({row["batch"] for rows in (self.rows, *self.rivals.values()) for row in rows})
            axes.set(xscale="log", yscale="log", xlabel="batch (rows decoding)", ylabel="tokens a second")
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.legend(frameon=False)
        return figure

    def _floor(self, axes: Axes) -> None:
        """What the bytes of weights and adapters alone would allow."""
        floors = [row for row in self.rows if row.get("floor_ms")]
        for mode, style in (("base", ":"), ("distinct", (0, (5, 1)))):
            mine = sorted((row for row in floors if row["mode"] == mode), key=lambda row: row["batch"])
            if mine:
                batches = [row["batch"] for row in mine]
                rates = [row["batch"] / row["floor_ms"] * 1e3 for row in mine]
                axes.plot(batches, rates, color=NEUTRAL, linestyle=style, label=f"byte floor, {mode}")

    def _lines(self, axes: Axes, name: str, rows: list[Row], marker: str, style: str, engine: int) -> None:
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["batch"])
            color = COLORS[DISTRIBUTIONS.index(mode)]
            axes.plot(
                [row["batch"] for row in mine],
                [row["tok_s"] for row in mine],
                color=color,
                linestyle=style,
                marker=marker,
                label=f"{name}, {mode}",
                zorder=3 - 0.1 * engine,
            )


def _batch_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("mode") in DISTRIBUTIONS and row.get("batch") and row.get("tok_s")]

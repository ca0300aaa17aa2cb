"""Routers drawn side by side: hit rate, loads and the slowest first tokens, with every repetition as a mark."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot.picture import COLORS, NEUTRAL, new_picture


class RoutingResults:
    """A result file of ``benchmarks.routing``, ready to draw. Raises ValueError for one that compares nothing."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = [row for row in content["rows"] if row.get("repetition") == "all"]
        self.each: list[dict[str, Any]] = [row for row in content["rows"] if row.get("repetition", "all") != "all"]
        if not self.rows:
            raise ValueError("no rows of a comparison")
        self.title = f"{content['device']} · {content['date']}"

    def draw(self) -> Figure:
        """The figure."""
        with new_picture(3, f"Routers on a cluster, {self.title}") as (figure, axes):
            self._bars(axes[0], "hit_rate", "Found in a slot", "share of requests")
            self._bars(axes[1], "loads", "Loads", "adapters copied to slots, a repetition")
            self._bars(axes[2], "ttft_ms_p99", "Time to first token, p99", "ms")
        return figure

    def _bars(self, axes: Axes, column: str, title: str, label: str) -> None:
        names = [row["policy"] for row in self.rows]
        axes.bar(names, [row[column] for row in self.rows], 0.6, color=COLORS[: len(names)])
        marks = [(row["policy"], row[column]) for row in self.each if row[column] is not None]
        if marks:
            axes.plot(*zip(*marks, strict=True), "o", color=NEUTRAL, label="one repetition")
            axes.legend(frameon=False)
        axes.set(title=title, ylabel=label)

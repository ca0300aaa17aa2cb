"""Serving results drawn: latency, share of requests in time and throughput against the rate of arrivals."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot.picture import COLORS, NEUTRAL, new_picture

FLEETS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))  # marker and line


class ServingResults:
    """A result file of ``benchmarks.serving``, ready to draw. Raises ValueError for a file of another benchmark."""

    def __init__(self, content: dict[str, Any]) -> None:
        rows = content.get("rows", [])
        if content.get("benchmark") != "serving" or not rows:
            raise ValueError("not a result of benchmarks.serving with rows")
        self.rows: list[dict[str, Any]] = sorted(rows, key=lambda row: row["rate"])
        # (replicas, adapters): a line each; a server that was not started by the benchmark has unknown replicas.
        self.fleets = sorted({(row.get("replicas", 1), row["adapters"]) for row in rows})
        self.title = f"{content['device']} · {content['date']}"

    def draw(self) -> Figure:
        """The figure: time to first token, time between tokens, and requests in time, each over the rate."""
        with new_picture(3, f"Serving, {self.title}") as (figure, axes):
            self._latency(axes[0], "ttft", "Time to first token")
            self._latency(axes[1], "itl", "Time between tokens")
            self._attained(axes[2])
            for panel in axes:
                panel.set_xlabel("requests a second, Poisson")
                panel.set_xlim(left=0)
        return figure

    def _latency(self, axes: Axes, name: str, title: str) -> None:
        for number, share in enumerate(("p50", "p99")):
            self._line(axes, f"{name}_ms_{share}", share, COLORS[number])
        suffix = " on average in a request" if name == "itl" else ""
        limit = self.rows[0][f"slo_{name}_ms"]
        axes.axhline(limit, color=NEUTRAL, linestyle="--", label=f"objective, {limit:g} ms{suffix}")
        axes.set(yscale="log", ylabel="ms", title=title)
        axes.legend(frameon=False)

    def _attained(self, axes: Axes) -> None:
        self._line(axes, "attained", "share of requests within both objectives", COLORS[0])
        axes.set(ylim=(0, 1.05), ylabel="share of requests", title="Objectives met")
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        self._line(right, "goodput_rps", "requests a second within both (right)", COLORS[1])
        right.set_ylim(bottom=0)
        right.set_ylabel("requests a second")
        axes.legend(handles=[*axes.lines, *right.lines], frameon=False, loc="lower left")

    def _line(self, axes: Axes, column: str, label: str, color: str) -> None:
        for fleet, (marker, style) in zip(self.fleets, itertools.cycle(FLEETS), strict=False):
            mine = [row for row in self.rows if (row.get("replicas", 1), row["adapters"]) == fleet]
            points = [(row["rate"], row[column]) for row in mine if row.get(column) is not None]
            name = f"{fleet[0]} x {fleet[1]} adapters: {label}" if len(self.fleets) > 1 else label
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=style, label=name)

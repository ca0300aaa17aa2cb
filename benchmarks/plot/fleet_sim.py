"""A fleet simulated, drawn: hit rate, loads and first tokens of each policy over the sizes that were simulated."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plot.picture import COLORS, NEUTRAL, new_picture

Row = dict[str, Any]
_PANELS = (
    ("hit_rate", "requests that find their adapter in a slot", "linear"),
    ("loads_per_min", "adapters loaded a minute", "log"),
    ("ttft_p99_ms", "time to first token, p99, ms", "log"),
)


class FleetResults:
    """A result file of ``benchmarks.fleet_sim``, ready to draw. Raises ValueError for one without rows."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.rows: list[Row] = [row for row in content.get("rows", []) if "policy" in row]
        if not self.rows:
            raise ValueError("not a result of benchmarks.fleet_sim with rows of policies")
        self.title = f"{content['device']} · {content['date']}"
        self.cases = list(dict.fromkeys(_case(row) for row in self.rows))

    def draw(self) -> Figure:
        """The figure: a panel for each figure, a mark for each policy in each case."""
        with new_picture(len(_PANELS), f"Fleet simulation, {self.title}") as (figure, panels):
            for axes, (column, label, scale) in zip(panels, _PANELS, strict=True):
                self._panel(axes, column)
                axes.set(ylabel=label, yscale=scale)
                axes.set_xticks(range(len(self.cases)), self.cases, rotation=30, ha="right")
            panels[0].legend(frameon=False)
        return figure

    def _panel(self, axes: Axes, column: str) -> None:
        for color, policy in zip(COLORS, dict.fromkeys(row["policy"] for row in self.rows), strict=False):
            mine = [row for row in self.rows if row["policy"] == policy]
            places = [self.cases.index(_case(row)) for row in mine]
            axes.plot(places, [row[column] for row in mine], color=color, marker="o", linestyle="none", label=policy)
        if column == "hit_rate":
            best = {_case(row): row["optimal_hit_rate"] for row in self.rows}
            heights = [best[case] for case in self.cases]
            axes.plot(
                range(len(heights)),
                heights,
                color=NEUTRAL,
                linestyle="none",
                marker="_",
                markersize=18,
                label="best placement",
            )
            axes.set_ylim(0, 1)


def _case(row: Row) -> str:
    text = f"{row['replicas']} x {row['adapters']}, Zipf {row['zipf']:g}"
    return f"{text}, {row['failures']} die" if row.get("failures") else text

"""The figure of a result file, whichever benchmark wrote it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plot.decode import DecodeResults
from benchmarks.plot.fleet_sim import FleetResults
from benchmarks.plot.kernels import KernelResults
from benchmarks.plot.picture import DPI
from benchmarks.plot.routing import RoutingResults
from benchmarks.plot.serving import ServingResults


def draw(content: dict[str, Any], rivals: Sequence[Path] = ()) -> Figure:
    """The figure of one result file's content.

    Raises ValueError for the file of a benchmark that has no plot, for rivals where they cannot be drawn, and OSError
    for a rival's file that cannot be read.
    """
    kind = content.get("benchmark")
    if kind == "decode":
        return DecodeResults(content, dict(map(_rival, rivals))).draw()
    if rivals:
        raise ValueError(f"rivals are drawn beside a result of benchmarks.decode, and this is one of {kind!r}")
    match kind:
        case "kernels":
            return KernelResults(content).draw()
        case "serving":
            return ServingResults(content).draw()
        case "fleet_sim":
            return FleetResults(content).draw()
        case "routing":
            return RoutingResults(content).draw()
        case _:
            raise ValueError(
                f"its benchmark is {kind!r}: only results of kernels, decode, routing and serving have a plot"
            )


def save(content: dict[str, Any], out: Path, rivals: Sequence[Path] = ()) -> None:
    """Write the figure as a PNG. Raises as ``draw`` does."""
    figure = draw(content, rivals)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)
    print(out)


def _rival(file: Path) -> tuple[str, list[dict[str, Any]]]:
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f'{file} has no list of "rows": write it in the form of benchmarks.decode\'s JSON')
    return content.get("name") or file.stem, content["rows"]

"""Draws a result file of ``benchmarks.kernels``, ``benchmarks.decode`` or ``benchmarks.serving``, whichever it is.

    python -m benchmarks.plot benchmarks/results/kernels-h100.json          # writes kernels-h100.png beside it
    python -m benchmarks.plot decode.json --rival other.json --out decode.png

A rival's file has the form of ours: ``rows`` with ``mode``, ``batch`` and ``tok_s``; its ``name`` is what the plot
calls it (the file's name without one).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.picture import DPI
from benchmarks.plot_decode import DecodeResults
from benchmarks.plot_kernels import KernelResults
from benchmarks.plot_serving import ServingResults


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
        case _:
            raise ValueError(f"its benchmark is {kind!r}: only results of kernels, decode and serving have a plot")


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


def main() -> None:
    """Parse the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON that a benchmark wrote")
    parser.add_argument("--rival", type=Path, action="append", default=[], help="JSON of another engine's decode rows")
    parser.add_argument("--out", type=Path, help="PNG to write (default: beside the JSON)")
    arguments = parser.parse_args()
    try:
        content = json.loads(arguments.result.read_text())
        save(content, arguments.out or arguments.result.with_suffix(".png"), arguments.rival)
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.result}: {error}")


if __name__ == "__main__":
    main()

"""Draws a result file of ``benchmarks.kernels``, ``decode``, ``serving`` or ``fleet_sim``, whichever it is.

    python -m benchmarks.plot benchmarks/results/kernels-h100.json          # writes kernels-h100.png beside it
    python -m benchmarks.plot decode.json --rival other.json --out decode.png

A rival's file has the form of ours: ``rows`` with ``mode``, ``batch`` and ``tok_s``; its ``name`` is what the plot
calls it (the file's name without one).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.plot.draw import save


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

"""The one form of every result: device, versions, command, date and rows, as a table and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's and how many of its cores there are for this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_versions(names: Sequence[str] = ("torch", "triton", "ray")) -> dict[str, str]:
    """Installed versions of the packages that shape a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's results, ready to print and to write."""

    benchmark: str
    device: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """The result file's content."""
        return {
            "benchmark": self.benchmark,
            "device": self.device,
            "versions": package_versions(),
            "command": shlex.join(["python", "-m", f"benchmarks.{self.benchmark}", *_measured_arguments(sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "rows": self.rows,
        }

    def table(self) -> str:
        """The rows as an aligned text table under a line that names machine, versions and command."""
        content = self.to_dict()
        versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
        lines = [f"{content['device']} ({versions})", f"$ {content['command']}", ""]
        if self.rows:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            cells = [columns, *([cell(row.get(name)) for name in columns] for row in self.rows)]
            widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(lines)

    def write(self, path: Path | None) -> None:
        """Print the table and, when a path is given, write the JSON there."""
        print(self.table(), flush=True)
        if path is not None:
            self.save(path)

    def save(self, path: Path) -> None:
        """Write the JSON alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def _measured_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments that shape the result: all but where it is written and drawn."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.partition("=")
        if name not in ("--json", "--plot"):
            kept.append(argument)
        elif not value:
            next(rest, None)
    return kept


def cell(value: object) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "/".join(map(cell, value)) or "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)

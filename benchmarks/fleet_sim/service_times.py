"""How long a replica takes for things: read from the result files of the engine's own benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Seconds. Prompts are as long as in the measurements.

    steps: ``steps[rows][adapters]``, one decode step of so many rows with so many distinct adapters among them.
    prefill: what one prompt takes of the device. idle_steps, busy_steps: decode steps between the end of the prompt and
    its first token at the client, on a replica that decodes nothing and on one that does. copy: how long the copy
    stream is taken by one adapter. from_host, from_disk: what a first token comes later when its adapter is in host
    memory, and what later still when it is on disk.
    """

    steps: tuple[tuple[float, ...], ...]
    prefill: float
    idle_steps: float
    busy_steps: float
    copy: float
    from_host: float
    from_disk: float


def measured(max_rows: int, decode: Path | None = None, churn: Path | None = None) -> ServiceTimes:
    """From the JSON of ``benchmarks.decode`` and ``benchmarks.churn``, by default the ones on an H100 in results/.

    Between measured batches step times are interpolated, and between one adapter for all rows and one for each.
    """
    decoded = _rows(decode or RESULTS / "decode-h100.json")
    churned = {(row["mode"], row["case"]): row for row in _rows(churn or RESULTS / "churn-h100.json")}
    own, one, none = (_by_batch(decoded, mode, "step_ms_p50") for mode in ("distinct", "identical", "base"))
    first_tokens = _by_batch(decoded, "distinct", "ttft_ms_p50")
    few, many = min(first_tokens), max(batch for batch in first_tokens if batch <= max_rows)
    prefill = (first_tokens[many] - first_tokens[few]) / (many - few)  # so many prompts at once wait for the last
    resident, host, disk = (churned["arrivals", case] for case in ("resident", "host", "disk"))
    return ServiceTimes(
        steps=_step_table(max_rows, none, one, own),
        prefill=prefill / 1e3,
        idle_steps=(first_tokens[few] - few * prefill) / own[few],
        busy_steps=(resident["ttft_ms_p50"] - prefill) / resident["itl_ms_p50"],
        copy=churned["copy", "host to slot"]["ms_p50"] / 1e3,
        from_host=(host["ttft_ms_p50"] - resident["ttft_ms_p50"]) / 1e3,
        from_disk=(disk["ttft_ms_p50"] - host["ttft_ms_p50"]) / 1e3,
    )


def _step_table(
    max_rows: int, none: Mapping[int, float], one: Mapping[int, float], own: Mapping[int, float]
) -> tuple[tuple[float, ...], ...]:
    rows = np.arange(max_rows + 1)
    base, same, distinct = (np.interp(rows, sorted(ms), [ms[n] for n in sorted(ms)]) for ms in (none, one, own))
    table = [(0.0,)]
    for count in range(1, max_rows + 1):
        with_lora = np.interp(range(1, count + 1), (1, max(count, 2)), (same[count], distinct[count]))
        table.append((float(base[count]) / 1e3, *(with_lora / 1e3).tolist()))
    return tuple(table)


def _rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"]


def _by_batch(rows: list[dict[str, Any]], mode: str, column: str) -> dict[int, float]:
    return {row["batch"]: row[column] for row in rows if row["mode"] == mode}

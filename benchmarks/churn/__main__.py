"""Twice as many adapters as slots: what moving them costs those that decode, and those that wait for them.

    python -m benchmarks.churn --json churn.json                       # Llama-3-8B's shape, rank 16: one large GPU
    python -m benchmarks.churn --shape tiny --json churn.json          # a look on a CPU
    python -m benchmarks.churn --parts copies,arrivals

Weights are random, adapters are real PEFT folders written first, prompts are random and no two alike. What is on disk
is in the system's page cache, and every request says its adapter's digest, as one through a server does: reading
verifies it. Each part prints its rows when it is done; one that fails prints its error and leaves the others to go on,
and the exit status is 1 then.

copies: one adapter, from host memory to where a step may read it, and from disk to host memory, verified and packed.

arrivals: ``--rows`` rows decode on adapters in slots, and every eighth step a request of ``--prompt`` tokens arrives
whose adapter is in a slot, in host memory, or on disk. itl_ms is what the running rows wait between tokens from the
first arrival on, quiet_itl_ms the same before; ttft_ms is the arrivals'.

loads: ``--batch`` rows decode while ``--cold`` adapters a second are brought from disk to slots, in turns with time in
which none is (quiet_itl_ms); ratio is between the two p99. And the same with requests that arrive on cold adapters, in
turns with as many on adapters in slots.

poisson: requests at random times, ``--rate`` a second, on adapters by Zipf's law with exponent 1: all with a slot, and
all there are, beginning with the likely half in host memory alone; ratio is between the two ttft_ms_p50.

reads and copies: adapters that went from disk to host memory, and from there to slots, meanwhile. limit: what is asked
of this shape on one H100; met: whether it was.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.churn.arrivals import PLACES, ChurnArrivals
from benchmarks.churn.copies import ChurnCopies
from benchmarks.churn.loads import CASES, ChurnLoads
from benchmarks.churn.poisson import ChurnPoisson
from benchmarks.common.options import some_of
from benchmarks.common.random_engine import RandomEngine, random_engine
from benchmarks.common.report import Report, Row, device_name
from benchmarks.common.synthetic import SHAPES
from benchmarks.decode.arrivals import RUNNING_TOKENS

PARTS = ("copies", "arrivals", "loads", "poisson")
PATIENCE_S = 60.0  # with one part
# (mode, case) -> column -> the most it may be, for Llama-3-8B's shape with rank 16 on one H100.
LIMITS: dict[tuple[str, str], dict[str, float]] = {
    ("copy", "host to slot"): {"ms_p50": 4.0},
    ("arrivals", "resident"): {"itl_ms_p99": 25.0, "ttft_ms_p50": 40.0},
    ("arrivals", "host"): {"itl_ms_p99": 27.0, "ttft_ms_p50": 45.0},
    ("arrivals", "disk"): {"itl_ms_p99": 27.0, "ttft_ms_p50": 150.0},
    ("loads", "from disk to slot"): {"ratio": 1.10},
    ("loads", "cold arrivals"): {"ratio": 1.10},
    ("poisson", "churn"): {"ratio": 1.5},
}

Measure = Callable[[RandomEngine], Awaitable[list[Row]]]


async def run(arguments: argparse.Namespace, folder: Path) -> Report:
    """Build the engine once and measure everything asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report("churn", device_name(device), [])
    limited = device.type == "cuda" and (arguments.shape, arguments.rank) == ("llama-3-8b", 16)
    begun = time.perf_counter()
    async with random_engine(
        folder,
        arguments.shape,
        2 * arguments.slots,
        (arguments.rank,),
        slots={arguments.rank: arguments.slots},
        max_rows=arguments.slots,
        max_model_len=arguments.prompt + RUNNING_TOKENS + 16,
    ) as made:
        ready = time.perf_counter() - begun
        print(f"ready after {ready:.1f} s, {made.start_s:.1f} s of them the engine's start", flush=True)
        for name, measure in _measures(arguments):
            started = time.perf_counter()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    rows = await measure(made)
            except Exception as error:
                traceback.print_exc()
                rows = [{"mode": name, "error": f"{type(error).__name__}: {error}"}]
            for row in rows:
                report.rows.append(judged(row) if limited else row)
                print(report.rows[-1], flush=True)
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
            if arguments.json:
                report.save(arguments.json)
    return report


def _measures(arguments: argparse.Namespace) -> list[tuple[str, Measure]]:
    """What is asked for, in order, under names for errors."""
    slots, prompt = arguments.slots, arguments.prompt
    copies = ChurnCopies(arguments.repeats)
    arrivals = ChurnArrivals(arguments.rows, arguments.arrivals, prompt, slots)
    loads = ChurnLoads(arguments.batch, prompt, slots, arguments.cold, arguments.windows, arguments.window_s)
    poisson = ChurnPoisson(arguments.rate, arguments.duration, prompt, arguments.tokens, slots)
    parts: dict[str, list[tuple[str, Measure]]] = {
        "copies": [("copies", copies.measure)],
        "arrivals": [(f"arrivals, {place}", partial(arrivals.measure, place=place)) for place in PLACES],
        "loads": [(f"loads, {case}", partial(loads.measure, case=case)) for case in CASES],
        "poisson": [("poisson", poisson.measure)],
    }
    return [measure for part in PARTS if part in arguments.parts for measure in parts[part]]


def judged(row: Row) -> Row:
    """The row with what is asked of it, and whether it is met."""
    limits = LIMITS.get((row["mode"], row.get("case", "")), {})
    if not limits or "error" in row:
        return row
    text = ", ".join(f"{column} <= {most:g}" for column, most in limits.items())
    return row | {"limit": text, "met": all(row[column] <= most for column, most in limits.items())}


def main() -> None:
    """Parse the command line, measure, print and write. Exits with status 1 when a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, default=40, help="adapter slots and most rows; adapters are twice as many")
    parser.add_argument(
        "--parts", type=some_of(PARTS), default=",".join(PARTS), help=f"of {', '.join(PARTS)}, comma separated"
    )
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=12, help="copies: how many of each kind")
    parser.add_argument("--rows", type=int, default=24, help="arrivals: rows that decode meanwhile")
    parser.add_argument("--arrivals", type=int, default=24, help="arrivals: how many in each case")
    parser.add_argument("--batch", type=int, default=32, help="loads: rows that decode meanwhile")
    parser.add_argument("--cold", type=float, default=4.0, help="loads: cold adapters a second")
    parser.add_argument("--windows", type=int, default=8, help="loads: windows in turns, without and with them")
    parser.add_argument("--window-s", type=float, default=0.75, help="loads: seconds of each")
    parser.add_argument("--rate", type=float, default=20.0, help="poisson: requests a second")
    parser.add_argument("--duration", type=float, default=5.0, help="poisson: seconds in which they arrive")
    parser.add_argument("--tokens", type=int, default=64, help="poisson: tokens of an answer")
    parser.add_argument("--json", type=Path, help="also write the result here, after each part")
    arguments = parser.parse_args()
    if max(arguments.rows, arguments.batch) >= arguments.slots:
        parser.error("--rows and --batch decode beside others: give them more --slots")
    with tempfile.TemporaryDirectory(prefix="lorafleet-churn-") as folder:
        report = asyncio.run(run(arguments, Path(folder)))
    report.write(arguments.json)
    if any("error" in row for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

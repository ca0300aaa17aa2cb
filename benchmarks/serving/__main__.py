"""Open-loop load over HTTP: requests arrive when they arrive, and every latency counts from there.

    python -m benchmarks.serving --rate 2,4 --duration 5                    # a look on a CPU, under a minute
    python -m benchmarks.serving --rate 2,4,8 --duration 60 --json serving.json --plot serving.png
    python -m benchmarks.serving --adapters 64 --zipf 1.0 --slots 8
    python -m benchmarks.serving --shape llama-3-8b --adapters 64 --rows 64 --num-gpus 1 --start-s 300
    python -m benchmarks.serving --shape llama-3-8b --fleets 1:64,2:128 --slots 64 --rows 64 --num-gpus 1 --clients 4
    python -m benchmarks.serving --url http://localhost:8000 --prefix tenant- --adapters 100 --rate 4

Without ``--url`` it starts the server of serve_config.yaml on a free port, in a Ray instance of its own: the demo model
and its adapters, or with ``--adapters`` that many random ones, or with ``--shape`` random weights of that shape under
a tokenizer of words. With ``--url`` the server is any that speaks OpenAI's API and reports usage in a stream; device
and versions in the result are then those of this client (``--device`` says otherwise).

Arrivals are Poisson at each rate, times the replicas, for ``--duration`` seconds, sent by ``--clients`` processes; then
all answers are awaited before the next rate. A request names the n-th adapter with a probability in proportion to
1 / n ** zipf; nothing is done before to bring adapters to their slots. Prompt and answer lengths are lognormal, with
the medians ``--prompt`` and ``--output`` tokens and ``--sigma``, clipped to 4 up to ``--max-prompt`` and
``--max-output``; prompts are random words, their number fitted to the server's tokenizer by two requests that are not
measured. Answers are greedy and go to their full length (``ignore_eos``). The same seed sends the same requests.

Of a server that it started, what its engines counted from the first quarter of the arrivals to their end: engine_tok_s,
generated tokens a second; loads, copies of adapters to slots, and hit_rate, the share of requests that needed none; the
same for each replica. times_first: engine_tok_s at a fleet's best rate over that of the first of ``--fleets``.
cores_proxy, cores_gateway, cores_replica, cores_client: how many CPU cores those processes kept busy, all of a kind
together; one Serve proxy is one process.

A late server delays no arrival, and a request that this client sent late (late_ms_p99) counts from when it was due.
ttft_ms: to the first token. itl_ms: between events of a stream as they came, which may carry several tokens each.
token_ms: mean time a token after the first, of one request. total_ms: to the end. attained: share of all requests,
failed ones included, with ttft_ms within ``--slo-ttft-ms`` and token_ms within ``--slo-itl-ms``; goodput_rps: such
requests a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from benchmarks.common.lengths import Lengths
from benchmarks.common.options import picture
from benchmarks.common.report import Report, Row, cell, device_name
from benchmarks.common.synthetic import SHAPES
from benchmarks.serving.fleet_stats import FleetStats
from benchmarks.serving.host import ServingHost
from benchmarks.serving.load import Fleet, Load


def run(arguments: argparse.Namespace) -> Report:
    """Measure the server given, or one fleet after another that is started for it. Every row is printed and written as
    it comes, so that a run that is cut off leaves what it has measured."""
    name = arguments.device or device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report("serving", name, [])
    until = time.perf_counter() + arguments.seconds
    load = Load.of(arguments, until)

    def keep(row: Row) -> None:
        report.rows.append(row)
        compare(report.rows)
        print(", ".join(f"{name} {cell(value)}" for name, value in row.items()), flush=True)
        if arguments.json is not None:
            report.save(arguments.json)

    if arguments.url is not None:
        asyncio.run(load.measure(arguments.url, arguments.adapters, keep))
        return report
    with tempfile.TemporaryDirectory(prefix="lf-", dir="/tmp") as folder:
        for replicas, adapters in arguments.fleets or [(arguments.replicas, arguments.adapters)]:
            left = until - time.perf_counter()
            if left < load.seconds:
                print(f"no time left for {replicas} replicas with {adapters} adapters", file=sys.stderr, flush=True)
                continue
            server = host(arguments, replicas, adapters, Path(folder)).start(min(arguments.start_s, left))
            try:
                with contextlib.closing(FleetStats(server.gcs_address, server.env_of_clients)) as stats:
                    fleet = Fleet(replicas, arguments.gateways, server, stats)
                    asyncio.run(load.measure(server.url, adapters, keep, fleet))
            finally:
                server.stop()
    return report


def host(arguments: argparse.Namespace, replicas: int, adapters: int | None, folder: Path) -> ServingHost:
    """The server of one fleet."""
    return ServingHost(
        arguments.shape,
        adapters,
        arguments.rank,
        arguments.slots,
        arguments.rows,
        replicas,
        arguments.num_gpus,
        arguments.gateways,
        folder,
        dict(arguments.set),
    )


def compare(rows: Sequence[Row]) -> None:
    """Say of every fleet's best rate how its engines' throughput stands to the first fleet's best."""
    best: dict[tuple[int, int], Row] = {}
    for row in rows:
        row.pop("times_first", None)
        if row.get("engine_tok_s"):
            fleet = row["replicas"], row["adapters"]
            if fleet not in best or row["engine_tok_s"] > best[fleet]["engine_tok_s"]:
                best[fleet] = row
    for row in best.values():
        row["times_first"] = row["engine_tok_s"] / next(iter(best.values()))["engine_tok_s"]


def main() -> None:
    """Parse the command line, measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=_rates, default="2,4,8", help="requests a second and replica, comma separated")
    load.add_argument("--duration", type=float, default=10.0, help="seconds of arrivals a rate")
    load.add_argument("--adapters", type=int, help="how many take part, 0 for the base model alone (default: all)")
    load.add_argument("--prefix", help="with --url: adapters are PREFIX000 and so on, instead of those listed")
    load.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' shares; 0: all alike")
    load.add_argument("--prompt", type=float, default=64, help="median tokens of a prompt")
    load.add_argument("--output", type=float, default=32, help="median tokens of an answer")
    load.add_argument("--sigma", type=float, default=0.6, help="of both lognormal lengths")
    load.add_argument("--max-prompt", type=int, default=256)
    load.add_argument("--max-output", type=int, default=128)
    load.add_argument("--api", choices=("completions", "chat"), default="completions")
    load.add_argument("--timeout-s", type=float, default=120, help="longest wait for a whole answer")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--slo-ttft-ms", type=float, default=500)
    load.add_argument("--slo-itl-ms", type=float, default=50)
    load.add_argument("--clients", type=int, default=1, help="client processes")
    load.add_argument("--seconds", type=float, default=math.inf, help="for everything: what fits no more is left out")
    host = parser.add_argument_group("server")
    host.add_argument("--url", help="a server that runs already")
    host.add_argument("--device", help="what the result names as the server's device (default: this machine's)")
    host.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape (default: the demo model)")
    host.add_argument("--rank", type=int, default=16, help="of adapters that are made")
    host.add_argument("--slots", type=int, help="adapter slots a replica, of that rank")
    host.add_argument("--rows", type=int, help="most requests in one step of a replica")
    host.add_argument("--replicas", type=int, default=1)
    host.add_argument("--gateways", type=int, default=1)
    host.add_argument("--fleets", type=_fleets, help="replicas:adapters, comma separated: a server each, compared")
    host.add_argument("--set", type=_setting, action="append", default=[], help="section.key=value of the settings")
    host.add_argument("--num-gpus", type=float, help="GPUs a replica, fractions allowed (default: as configured)")
    host.add_argument("--start-s", type=float, default=180, help="longest wait for the first answer")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--plot", type=picture, help="also draw it here (PNG)")
    arguments = parser.parse_args()
    try:
        arguments.prompt = Lengths(arguments.prompt, arguments.sigma, 4, arguments.max_prompt)
        arguments.output = Lengths(arguments.output, arguments.sigma, 4, arguments.max_output)
    except ValueError as error:
        parser.error(f"--prompt, --output: {error}")
    report = run(arguments)
    report.write(arguments.json)
    if arguments.plot and report.rows:
        from benchmarks.plot.draw import save  # noqa: PLC0415 (matplotlib is an extra)

        save(report.to_dict(), arguments.plot)


def _fleets(text: str) -> list[tuple[int, int]]:
    fleets = [(int(replicas), int(adapters)) for replicas, adapters in (part.split(":") for part in text.split(","))]
    if not all(replicas > 0 and adapters >= 0 for replicas, adapters in fleets):
        raise argparse.ArgumentTypeError("fleets have 1 replica or more")
    return fleets


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form section.key=value")
    return key, yaml.safe_load(value)


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError("rates must be above 0")
    return rates


if __name__ == "__main__":
    main()

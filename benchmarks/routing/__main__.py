"""Our router, Serve's default with its multiplexing table and Serve's consistent hashing, side by side on one cluster.

    python -m benchmarks.routing --requests 300 --adapters 60 --repetitions 1      # a look, two minutes
    python -m benchmarks.routing --rate 120 --json routing.json --plot routing.png # 8 minutes on 16 cores
    python -m benchmarks.routing                                                   # 22 minutes on two cores
    python -m benchmarks.routing --kill-node                                       # our router, a node lost in mid-run

Starts a Ray cluster of three nodes on this machine, each with a Serve proxy. The routers take turns, each with an
application of its own that is deployed for the turn: four CPU replicas of the demo model and three gateways, one a
node. The applications differ in the router, and that of Serve's default has slots of least recent use, as its table
has. Adapters are in a store some way off: three times ``--exchange-ms`` brings one to a replica; there is room for
some of them in a replica's host memory, and for few on its disk.

Requests come over HTTP to the three proxies in turn, ``--rate`` a second; the n-th adapter's are in proportion to
1 / n ** zipf and come by a Gamma process of shape ``--shape``: 1 is Poisson, below 1 they come in bursts (the times
between them vary by 1 / sqrt(shape) of their mean). In each repetition the routers get the same requests, of which the
first ``--warm`` are not counted. Every text must be that of the adapter's own, which one engine alone has made before:
exits with 1 when one is not. Answers are greedy, of ``--tokens`` tokens.

With ``--kill-node`` all processes of the second node end at half of the requests. Exits with 1 when a request is lost
that had not begun to stream, or when one that had begun neither goes on nor is told so. A request whose own gateway is
lost before it has sent anything goes to another one, as a load balancer sees to.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.options import picture, some_of
from benchmarks.common.report import Report, Row, device_name
from benchmarks.routing.cluster import RoutingCluster
from benchmarks.routing.comparison import Run, counted, together, verdict
from benchmarks.routing.far_store import FarStore
from benchmarks.routing.node_loss import account, failures
from benchmarks.routing.policies import Policy, build
from benchmarks.routing.processor_time import processor_seconds
from benchmarks.routing.tenants import MODEL, Tenants, make_tenants
from benchmarks.routing.traffic import Outcome, Traffic, wait_for
from benchmarks.serving.load import print_errors
from deployments.settings import FleetSettings

NODES = 3
VICTIM = 1
FAR = "dir://adapters"
DISK_BYTES = 1 << 20  # a dozen adapters


def settings(arguments: argparse.Namespace, tenants: Tenants, far: FarStore, policy: Policy) -> FleetSettings:
    """The same for every router but for what ``Policy`` says."""
    own = {"eviction": "lru"} if policy is Policy.DEFAULT else {}
    return FleetSettings.model_validate(
        {
            "model": str(MODEL),
            "model_name": "lorafleet-demo",
            "adapters": {name: f"{FAR}/{name}@{digest}" for name, digest in tenants.digests.items()},
            "engine": {
                "model_name": "",
                "max_rows": arguments.rows,
                "max_waiting": 64,
                "cpu_threads": 1,
                "num_pages": 256,
                "slots": {arguments.rank: arguments.slots},
                **own,
            },
            "store": {
                "host_cache_bytes": arguments.host_mib << 20,
                "cache_dir": str(tenants.folder.parent / policy),
                "cache_bytes": DISK_BYTES,
                # A path below the store's URL, for a reference has no place for a port.
                "sources": {FAR: {"options": {"path": far.url, "target_protocol": "http"}}},
            },
            "replicas": {"num_replicas": arguments.replicas, "num_gpus": 0},
            "gateway": {"num_replicas": NODES},
        }
    )


def deployed(
    arguments: argparse.Namespace, tenants: Tenants, far: FarStore, cluster: RoutingCluster, policy: Policy
) -> str:
    """The name of an application with this router, when every gateway's proxy knows it."""
    cluster.deploy(policy.value, build(policy, settings(arguments, tenants, far, policy), arguments.slots))
    asyncio.run(wait_for(cluster.urls, policy.value))
    return policy.value


def compare(arguments: argparse.Namespace, tenants: Tenants, far: FarStore, cluster: RoutingCluster) -> list[Run]:
    """All routers, taking turns."""
    deploy = partial(deployed, arguments, tenants, far, cluster)
    traffic = Traffic(tenants, arguments.rate, arguments.zipf, arguments.shape)
    runs: list[Run] = []
    # A new cluster's first application is served more slowly than those after it, whatever its router.
    first = traffic.arrivals(arguments.warm, 0, arguments.seed)[0]
    asyncio.run(traffic.offer(cluster.urls, deploy(arguments.policies[0]), first))
    cluster.remove(arguments.policies[0])
    for repetition in range(1, arguments.repetitions + 1):
        warm, arrivals = traffic.arrivals(arguments.warm, arguments.requests, arguments.seed + repetition)
        shift = (repetition - 1) % len(arguments.policies)
        for policy in (*arguments.policies[shift:], *arguments.policies[:shift]):
            name = deploy(policy)
            asyncio.run(traffic.offer(cluster.urls, name, warm))
            before, spent, begun = cluster.stats(name), processor_seconds(), time.monotonic()
            outcomes = asyncio.run(traffic.offer(cluster.urls, name, arrivals))
            seconds = time.monotonic() - begun
            spent = {kind: total - spent[kind] for kind, total in processor_seconds().items()}
            runs.append(Run(policy, repetition, outcomes, counted(before, cluster.stats(name)), spent, seconds))
            show(runs[-1].row())
            print_errors(traffic.rate, [outcome.answer for outcome in outcomes])
            if policy is Policy.OURS:
                print(f"our router's reasons: {cluster.reasons(name)}", flush=True)
            cluster.remove(name)
    return runs


def lose_node(arguments: argparse.Namespace, tenants: Tenants, far: FarStore, cluster: RoutingCluster) -> Row:
    """Our router, and a node less from the middle on."""
    name = deployed(arguments, tenants, far, cluster, Policy.OURS)
    traffic = Traffic(tenants, arguments.rate, arguments.zipf, arguments.shape)

    async def run() -> list[Outcome]:
        warm, arrivals = traffic.arrivals(arguments.warm, arguments.requests, arguments.seed + 1)
        await traffic.offer(cluster.urls, name, warm)
        offered = asyncio.create_task(traffic.offer(cluster.urls, name, arrivals))
        await asyncio.sleep(arrivals[len(arrivals) // 2].at)
        await asyncio.to_thread(cluster.kill, VICTIM)
        return await offered

    outcomes = asyncio.run(run())
    for outcome in outcomes:
        if not outcome.whole or not outcome.exact:
            print(f"{outcome.answer.ending}: {outcome.answer.error}, {len(outcome.answer.events)} events", flush=True)
    told = {"policy": name, "nodes": NODES, "survivors": cluster.alive(), "replicas": arguments.replicas}
    return told | account(outcomes)


def show(row: Row) -> None:
    """One line while it runs."""
    kept = ("policy", "repetition", "requests", "errors", "exact", "hit_rate", "loads", "fetched")
    kept += ("ttft_ms_p50", "ttft_ms_p99", *(name for name in row if name.endswith("_cores")))
    print(
        "  ".join(f"{name} {row[name]:.3g}" if isinstance(row[name], float) else f"{name} {row[name]}" for name in kept)
    )
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, print, write and draw; fail on a wrong text or a lost request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="a router and repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm", type=int, default=150, help="requests before, not counted")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--shape", type=float, default=0.125, help="of the Gamma times between an adapter's requests")
    parser.add_argument("--exchange-ms", type=float, default=20.0, help="of the adapters' store, three for an adapter")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2, help="different ones an adapter")
    parser.add_argument("--tokens", type=int, help="of an answer (default: 4, with --kill-node 64)")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8, help="a replica")
    parser.add_argument("--rows", type=int, default=32, help="most requests in one step of a replica")
    parser.add_argument("--host-mib", type=int, default=16, help="a replica's host cache, some 50 adapters of rank 4")
    parser.add_argument("--policies", type=some_of(Policy), default=list(Policy), help=f"of {', '.join(Policy)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-node", action="store_true", help="our router alone, a node killed in mid-run")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--plot", type=picture, help="also draw it here (PNG)")
    parsed = parser.parse_args(arguments)
    parsed.tokens = parsed.tokens or (64 if parsed.kill_node else 4)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lf-", dir="/tmp") as folder:
        tenants = asyncio.run(
            make_tenants(Path(folder) / "adapters", parsed.adapters, parsed.rank, parsed.prompts, parsed.tokens)
        )
        with FarStore(tenants.folder.parent, parsed.exchange_ms / 1e3) as far, RoutingCluster(NODES) as cluster:
            if parsed.kill_node:
                rows = [lose_node(parsed, tenants, far, cluster)]
                bad = failures(rows[0])
            else:
                runs = compare(parsed, tenants, far, cluster)
                rows = [*together(runs), *(run.row() for run in runs)]
                bad = [
                    f"{row['policy']}: {row['requests'] - row['exact']} not exact"
                    for row in rows
                    if row["exact"] < row["requests"]
                ]
    report = Report("routing", device_name(torch.device("cpu")), rows)
    report.write(parsed.json)
    for line in verdict(rows) if not parsed.kill_node else ():
        print(line)
    if parsed.plot:
        from benchmarks.plot.draw import save  # noqa: PLC0415 (matplotlib is an extra)

        save(report.to_dict(), parsed.plot)
    if bad:
        sys.exit(", ".join(bad))


if __name__ == "__main__":
    main()

"""What the cluster's processes spend, by what they are."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import psutil

# Part of a process's title -> what it is. Ray names its workers after the actor in them.
KINDS = {
    "LoraReplica": "replicas",
    "Gateway": "gateways",
    "FleetHub": "hub",
    "ProxyActor": "proxies",
    "ServeController": "controller",
}


def processor_seconds() -> dict[str, float]:
    """Seconds of processor time so far, by kind, of all processes that this one started; ``client`` is this one's."""
    spent: defaultdict[str, float] = defaultdict(float)
    own = psutil.Process()
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()) or process.name()
            kind = next((kind for part, kind in KINDS.items() if part in title), "rest")
            spent[kind] += sum(process.cpu_times()[:2])
    spent["client"] = sum(own.cpu_times()[:2])
    return spent

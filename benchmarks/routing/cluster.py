"""Several Ray nodes on one machine, each with a Serve proxy of its own, and the applications on them."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster
from ray.serve import Application

from benchmarks.serving.server import ROOT, TRANSPORT

#: Ray gives way to whatever else runs on the machine, and then that is what is measured.
ENVIRONMENT = TRANSPORT | {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}
CPUS = 32  # a node's, as far as Ray is told: enough for whatever is deployed
READY_SECONDS = 180.0


class RoutingCluster:
    """``with RoutingCluster(3) as cluster``: this process is connected to the first node, which cannot be killed."""

    def __init__(self, nodes: int) -> None:
        self._count = nodes
        self._folder = Path(tempfile.mkdtemp(prefix="lf-", dir="/tmp"))  # the path of Ray's sockets must be short
        self._cluster: Cluster | None = None
        self._nodes: list[Any] = []
        self._ports = [_free_port() for _ in range(nodes)]

    def __enter__(self) -> RoutingCluster:
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        # Where ``Cluster`` writes its address, which nothing else has made yet on a machine of no other Ray.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        self._cluster = Cluster()
        try:
            for number, port in enumerate(self._ports):
                own = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port)} if number else {}
                env = ENVIRONMENT | own
                node: dict[str, Any] = {"num_cpus": CPUS, "env_vars": env, "include_dashboard": False}
                if not number:
                    node["temp_dir"] = str(self._folder)
                self._nodes.append(self._cluster.add_node(**node))
            ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": self._ports[0]})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def urls(self) -> list[str]:
        """One proxy a node."""
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    def deploy(self, name: str, application: Application) -> None:
        """Under its name as route prefix; returns when all of its replicas run."""
        serve.run(application, name=name, route_prefix=f"/{name}")
        deadline = time.monotonic() + READY_SECONDS
        while not all(one.status == "HEALTHY" for one in serve.status().applications[name].deployments.values()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not up after {READY_SECONDS:.0f} s: {serve.status()}")
            time.sleep(0.2)

    def remove(self, name: str) -> None:
        """Take an application down; returns when it is gone."""
        serve.delete(name)

    def stats(self, name: str) -> list[dict[str, Any]]:
        """``WatchedReplica.stats`` of every replica of an application."""
        handle: Any = serve.get_app_handle(name)
        return handle.fleet_stats.remote().result(timeout_s=60)

    def reasons(self, name: str) -> dict[str, int]:
        """Routing decisions of all its gateways, by reason."""
        total: dict[str, int] = {}
        handle: Any = serve.get_app_handle(name)
        for one in handle.broadcast("routing_counters").results(timeout_s=30):
            for reason, count in one.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def alive(self) -> int:
        """Nodes that Ray takes for alive."""
        return sum(node["Alive"] for node in ray.nodes())

    def kill(self, number: int) -> None:
        """End all processes of one node at once."""
        assert self._cluster is not None
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    def close(self) -> None:
        """End what this object started."""
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

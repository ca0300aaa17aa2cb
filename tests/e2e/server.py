"""The real server, with a folder for adapters that tests publish, and a second Ray application beside it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.serving import server
from benchmarks.serving.server import ROOT
from tests.adapter_store.hub_server import HubServer
from tests.deployments.collector import Collector

START_SECONDS = 180
BASE_MODEL = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]["model_name"]


class Server(server.Server):
    """The shipped configuration and one more folder of adapters, started."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = self.folder / "adapters"  # for adapters that a test publishes
        self.adapters.mkdir()
        self.config["adapter_folders"].append(str(self.adapters))
        self.hub = HubServer()
        self.hub.__enter__()
        self.config["store"] |= {
            "cache_dir": str(self.folder / "cache"),
            "hub_endpoint": self.hub.endpoint,
            "hub_refresh_s": 3600.0,
        }
        self.collector = Collector()
        self.collector.__enter__()
        self.config["tracing"] = {"endpoint": self.collector.url, "sample": 0.0}  # what clients trace, and nothing else
        self.env["OTEL_BSP_SCHEDULE_DELAY"] = "200"  # milliseconds
        self.start("robot, old, eats, school", START_SECONDS)

    def stop(self) -> None:
        super().stop()
        self.hub.stop()
        self.collector.__exit__()

    def deploy(
        self,
        user_config: dict[str, Any] | None = None,
        *,
        gateways: int = 1,
        replicas: int | None = None,
        beside: tuple[dict[str, Any], ...] = (),
        **args: Any,
    ) -> None:
        """Deploy the configuration again: with this ``user_config`` of both deployments, with more gateways, another
        number of replicas, other applications beside it, or changed ``args``. Returns when Serve has taken it; what it
        brings comes afterwards."""
        application = self._file["applications"][0]
        application["args"] = self.config | args
        application["deployments"] = [
            {"name": "Gateway", "num_replicas": gateways, "user_config": user_config},
            {"name": "LoraReplica", "user_config": user_config} | ({"num_replicas": replicas} if replicas else {}),
        ]
        file = self.folder / "redeployed.yaml"
        file.write_text(yaml.safe_dump(self._file | {"applications": [application, *beside]}))
        subprocess.run(
            [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", "--non-blocking", str(file)],
            cwd=ROOT,
            env=self.env | {"RAY_ADDRESS": self.gcs_address},
            check=True,
            capture_output=True,
            timeout=60,
        )

    def processes(self, title: str) -> dict[int, str]:
        """Ray's processes of this server whose title holds ``title``, such as ``LoraReplica``: pid -> title, without
        the method that runs there now."""
        assert self._process is not None
        found = {}
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith("ray::") and title in child.cmdline()[0]:
                    found[child.pid] = child.cmdline()[0].partition(".")[0]
        return found

    def metrics(self) -> str:
        """What Prometheus would scrape from this Ray node."""
        discovery = self.folder / "ray" / "prom_metrics_service_discovery.json"
        targets = json.loads(discovery.read_text())[0]["targets"]
        return "\n".join(httpx.get(f"http://{target}/metrics", trust_env=False).text for target in targets)


class OtherApplication:
    """``driver.py`` in a process that cannot import ours."""

    def __init__(self, server: Server) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("driver.py")), server.gcs_address],
            cwd=server.folder,
            env=server.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def ask(self, method: str, *args: Any, stream: bool = False, of: str = "lorafleet") -> dict[str, Any]:
        """``{"result"}`` or ``{"error"}``, and which of our modules the process holds. of: the application asked."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "args": args, "stream": stream, "of": of}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def call(self, method: str, *args: Any, stream: bool = False, of: str = "lorafleet") -> Any:
        """The result; an error fails the test."""
        answer = self.ask(method, *args, stream=stream, of=of)
        assert "result" in answer, answer
        return answer["result"]

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the other application ended"
        return json.loads(line)

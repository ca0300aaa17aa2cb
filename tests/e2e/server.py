"""The real server, with a folder for adapters that tests publish, and a second Ray application beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks import server
from benchmarks.server import ROOT

START_SECONDS = 180
BASE_MODEL = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]["model_name"]


class Server(server.Server):
    """The shipped configuration and one more folder of adapters, started."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = self.folder / "adapters"  # for adapters that a test publishes
        self.adapters.mkdir()
        self.config["adapter_folders"].append(str(self.adapters))
        self.start("robot, old, eats, school", START_SECONDS)

    @property
    def gcs_address(self) -> str:
        """Where another Ray application connects."""
        import ray

        port = next((self.folder / "ray" / "session_latest").glob("gcs_server_port_*")).read_text()
        return f"{ray.util.get_node_ip_address()}:{port.strip()}"


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

    def ask(self, method: str, *args: Any, stream: bool = False) -> dict[str, Any]:
        """``{"result"}`` or ``{"error"}``, and which of our modules the process holds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"method": method, "args": args, "stream": stream}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def call(self, method: str, *args: Any, stream: bool = False) -> Any:
        """The result; an error fails the test."""
        answer = self.ask(method, *args, stream=stream)
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

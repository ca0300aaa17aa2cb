"""The real server as a user starts it, and a second Ray application beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
BASE_MODEL = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]["model_name"]


class Server:
    """``serve run`` on serve_config.yaml with a free port, in a Ray instance of its own."""

    def __init__(self) -> None:
        # Ray's sockets live here, and the path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="lf-", dir="/tmp"))
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        self.port = config["http_options"]["port"] = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = config["applications"][0]["args"]
        self.adapters = self.folder / "adapters"  # for adapters that a test publishes
        self.adapters.mkdir()
        self.config["adapter_folders"].append(str(self.adapters))
        file = self.folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(config))
        self.log = self.folder / "serve.log"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = env | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env | {"RAY_ADDRESS": "local"},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    @property
    def gcs_address(self) -> str:
        """Where another Ray application connects."""
        import ray

        port = next((self.folder / "ray" / "session_latest").glob("gcs_server_port_*")).read_text()
        return f"{ray.util.get_node_ip_address()}:{port.strip()}"

    def stop(self) -> None:
        """End what this object started, and nothing else."""
        started = [self.process, *psutil.Process(self.process.pid).children(recursive=True)] if self._runs() else []
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in started[1:]:  # Ray's agents may outlive their node
            if child.is_running():
                child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self) -> str:
        """The last lines the server wrote."""
        return "\n".join(self.log.read_text().splitlines()[-40:])

    def _runs(self) -> bool:
        return self.process.poll() is None

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self._runs():
                raise RuntimeError(f"serve run ended:\n{self.tail()}")
            try:
                body = {"model": BASE_MODEL, "prompt": "robot, old, eats, school", "max_tokens": 1}
                if httpx.post(f"{self.url}/v1/completions", json=body, timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise RuntimeError(f"the server did not answer in {START_SECONDS} s:\n{self.tail()}")


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""The real server as a user starts it, in a Ray instance of its own: for benchmarks and end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
#: Kinds of the server's processes, and what their titles hold.
PROCESSES = {"proxy": "ProxyActor", "gateway": ":Gateway", "replica": ":LoraReplica"}
#: How Serve moves items between its processes under ``make serve``.
TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


class Server:
    """What ``make serve`` runs, on serve_config.yaml with its port replaced by a free one.

    Made with the shipped configuration: change ``config`` (the application's ``args``), then ``start``, and ``stop``
    when done. ``folder`` is a temporary folder that goes with the server; ``env`` the environment of its processes.
    """

    def __init__(self) -> None:
        # Ray's sockets live here, and the path of a socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="lf-", dir="/tmp"))
        self._file = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        self.config: dict[str, Any] = self._file["applications"][0]["args"]
        self.log = self.folder / "serve.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(self.folder), "RAY_USAGE_STATS_ENABLED": "0"}
        self.env = inherited | own
        port = self._file["http_options"]["port"] = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_model(self) -> str:
        """What clients call the base model."""
        return self.config["model_name"]

    @property
    def env_of_clients(self) -> dict[str, str]:
        """The environment of processes that call this server through a handle: not that of its own event loops."""
        return {name: value for name, value in self.env.items() if name not in TRANSPORT}

    @property
    def gcs_address(self) -> str:
        """Where another Ray application connects, once the server is up."""
        import ray  # noqa: PLC0415 (takes seconds)

        port = next((self.folder / "ray" / "session_latest").glob("gcs_server_port_*")).read_text()
        return f"{ray.util.get_node_ip_address()}:{port.strip()}"

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of this server's processes, by what they are."""
        assert self._process is not None
        spent = dict.fromkeys(PROCESSES, 0.0)
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                title, times = child.cmdline()[0], child.cpu_times()
                for kind, part in PROCESSES.items():
                    if title.startswith("ray::") and part in title:
                        spent[kind] += times.user + times.system
        return spent

    def start(self, prompt: str, seconds: float) -> None:
        """Start, and return when the base model has answered ``prompt``.

        Raises RuntimeError with the end of the log when the server ends or that takes longer than ``seconds``.
        """
        file = self.folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(self._file))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deployments.run", str(file)],
            cwd=ROOT,
            env=self.env | {"RAY_ADDRESS": "local"},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait(prompt, seconds)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End what ``start`` started, and nothing else."""
        process = self._process
        if process is not None:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            for child in children:  # Ray's agents may outlive their node
                if child.is_running():
                    child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, prompt: str, seconds: float) -> None:
        assert self._process is not None
        body = json.dumps({"model": self.base_model, "prompt": prompt, "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"serve run ended:\n{self._tail()}")
            try:
                with direct.open(request, timeout=30):
                    return
            except (urllib.error.URLError, OSError):  # not up yet, or up without a replica
                pass
            time.sleep(0.25)
        raise RuntimeError(f"the server did not answer in {seconds:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-40:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

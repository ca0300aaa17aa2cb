"""Keys, limits and TLS as Serve runs them: two gateways, one register, a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.serving import server
from deployments.tenants.keys import key_hash
from deployments.tenants.ledger import OWNER_SECONDS

KEYS = {name: f"lf-{name}-e2e" for name in ("free", "many", "few", "admin")}
LIMIT = 23
PLACES = 4


class TlsServer(server.Server):
    """Two gateways behind https, reached at every address of the machine, and a keys file."""

    def __init__(self) -> None:
        super().__init__()
        self.keys_file = self.folder / "keys.yaml"
        limits: dict[str, Any] = {"many": {"requests_per_minute": LIMIT}, "few": {"concurrency": PLACES}, "free": {}}
        entries = {name: {"keys": [key_hash(KEYS[name])], "adapters": ["shout"]} | of for name, of in limits.items()}
        self.keys_file.write_text(yaml.safe_dump({"admin": [key_hash(KEYS["admin"])], "tenants": entries}))
        key, certificate = self.folder / "key.pem", self.folder / "certificate.pem"
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        subprocess.run(
            [*command, "-days", "1", *subject, "-keyout", str(key), "-out", str(certificate)],
            check=True,
            capture_output=True,
        )
        self._file["http_options"] |= {
            "host": "0.0.0.0",
            "ssl_keyfile": str(key),
            "ssl_certfile": str(certificate),
        }
        self.url = self.url.replace("http://", "https://")
        self.trust = ssl.create_default_context(cafile=str(certificate))
        self.config["replicas"]["num_replicas"] = 1
        self.config["engine"]["max_rows"] = 32
        self.config["gateway"] = {"num_replicas": 2, "num_cpus": 0.1, "keys_file": str(self.keys_file), "admin": "on"}

    def client(self, who: str) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=200)
        headers = {"authorization": f"Bearer {KEYS[who]}"}
        return httpx.AsyncClient(
            base_url=self.url, verify=self.trust, headers=headers, trust_env=False, timeout=60, limits=limits
        )

    def _wait(self, prompt: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with httpx.Client(base_url=self.url, verify=self.trust, trust_env=False, timeout=30) as client:
            while time.monotonic() < deadline:
                assert self._process is not None and self._process.poll() is None, self._tail()
                try:
                    body = {"model": self.base_model, "prompt": prompt, "max_tokens": 1}
                    headers = {"authorization": f"Bearer {KEYS['free']}"}
                    if client.post("/v1/completions", json=body, headers=headers).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.25)
        raise RuntimeError(self._tail())

    def gateways(self) -> list[psutil.Process]:
        assert self._process is not None
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in children if child.cmdline() and ":Gateway" in child.cmdline()[0]]


@pytest.fixture(scope="module")
def tls() -> Iterator[TlsServer]:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    started = TlsServer()
    started.start("robot, old, eats, school", 180)
    yield started
    started.stop()


async def test_two_gateways_behind_tls_count_together_and_a_dead_ones_places_come_back(tls: TlsServer) -> None:
    body = {"model": "shout", "prompt": "robot, old, eats, school", "max_tokens": 1}
    async with httpx.AsyncClient(base_url=tls.url, trust_env=False) as stranger:
        with pytest.raises(httpx.ConnectError):
            await stranger.get("/health")  # nobody vouches for the certificate
    async with tls.client("many") as many, tls.client("few") as few:
        answers = await asyncio.gather(*(many.post("/v1/completions", json=body) for _ in range(3 * LIMIT)))
        assert Counter(answer.status_code for answer in answers) == {200: LIMIT, 429: 2 * LIMIT}
        assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {str(LIMIT)}

        assert len(tls.gateways()) == 2
        long = body | {"max_tokens": 400, "ignore_eos": True, "stream": True}
        streams = [few.stream("POST", "/v1/completions", json=long) for _ in range(3 * PLACES)]
        opened = await asyncio.gather(*(stream.__aenter__() for stream in streams))
        assert Counter(response.status_code for response in opened) == {200: PLACES, 429: 2 * PLACES}
        for gateway in tls.gateways():
            gateway.kill()
        await asyncio.gather(*(stream.__aexit__(None, None, None) for stream in streams))
        deadline, statuses = time.monotonic() + OWNER_SECONDS + 30, Counter()
        while statuses[200] < 2 * PLACES and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                statuses[(await few.post("/v1/completions", json=body)).status_code] += 1
            await asyncio.sleep(0.2)
        assert statuses[200] >= PLACES, statuses
        again = await many.post("/v1/completions", json=body)
        assert again.status_code in {200, 429}

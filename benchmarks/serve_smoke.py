"""Start the real server on the demo model, ask all five models at once, and check every text.

    python -m benchmarks.serve_smoke --replicas 1 --requests 200

Runs ``serve run`` on serve_config.yaml with a free port, in a Ray instance of its own, with GPUs where there are any.
Exits with 1 when a text is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import yaml

from benchmarks.report import Report, Row, device_name
from examples.demo.words import BASE, STYLES, answer, held_out_prompts

ROOT = Path(__file__).parents[1]


@contextmanager
def running_server(replicas: int, num_gpus: float | None, start_s: float) -> Iterator[tuple[str, str, float]]:
    """Yield the server's address, the base model's name and the seconds until it first answered."""
    with tempfile.TemporaryDirectory(prefix="lf-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = config["http_options"]["port"] = probe.getsockname()[1]
        args = config["applications"][0]["args"]
        args["replicas"]["num_replicas"] = replicas
        if num_gpus is not None:
            args["replicas"]["num_gpus"] = num_gpus
        file = folder / "serve_config.yaml"
        file.write_text(yaml.safe_dump(config))
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": name, "RAY_ADDRESS": "local"}
        log = folder / "serve.log"
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(url):
                if process.poll() is not None or time.perf_counter() - started > start_s:
                    raise RuntimeError(f"the server did not answer in {start_s:.0f} s:\n{log.read_text()[-6000:]}")
                time.sleep(0.2)
            yield url, args["model_name"], time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def ask(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[str, float, float]:
    """Stream one chat answer: its text, milliseconds to the first text and to the end."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 80,
        "stream": True,
    }
    sent = time.perf_counter()
    first = 0.0
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(f"{model}: HTTP {response.status_code} {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"{model}: {event['error']['message']}")
            piece = event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
            if piece and not text:
                first = (time.perf_counter() - sent) * 1e3
            text += piece
    return text, first, (time.perf_counter() - sent) * 1e3


async def ask_all(url: str, base_model: str, requests: int, at_once: int) -> list[Row]:
    """All requests, mixed over the models; one row a model."""
    prompts = held_out_prompts(requests)
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(number: int) -> tuple[str, bool, float, float]:
            style = STYLES[number % len(STYLES)]
            async with limit:
                text, first, total = await ask(client, base_model if style == BASE else style, prompts[number])
            return style, text == answer(prompts[number], style), first, total

        results = await asyncio.gather(*(one(number) for number in range(requests)))
    rows: list[Row] = []
    for style in STYLES:
        mine = [result for result in results if result[0] == style]
        rows.append(
            {
                "model": style,
                "requests": len(mine),
                "exact": sum(result[1] for result in mine),
                "ttft_ms_p50": statistics.median(result[2] for result in mine),
                "total_ms_p50": statistics.median(result[3] for result in mine),
            }
        )
    return rows


def main() -> None:
    """Run, print, and fail on a wrong text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--num-gpus", type=float, help="GPUs a replica, fractions allowed (default: as configured)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32, help="requests in flight")
    parser.add_argument("--start-s", type=float, default=180, help="longest wait for the first answer")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with running_server(arguments.replicas, arguments.num_gpus, arguments.start_s) as (url, base_model, start_s):
        rows = asyncio.run(ask_all(url, base_model, arguments.requests, arguments.at_once))
    for row in rows:
        row["start_s"] = start_s
    Report("serve_smoke", device_name(device), rows).write(arguments.json)
    if any(row["exact"] < row["requests"] for row in rows):
        sys.exit("a text was wrong")


if __name__ == "__main__":
    main()

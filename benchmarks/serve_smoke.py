"""Start the real server on the demo model, ask all five models at once, and check every text.

    python -m benchmarks.serve_smoke --replicas 1 --requests 200

Runs ``serve run`` on serve_config.yaml with a free port, in a Ray instance of its own, with GPUs where there are any.
Exits with 1 when a text is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import httpx
import torch

from benchmarks.common.report import Report, Row, device_name
from benchmarks.serving.server import Server
from examples.demo.words import BASE, STYLES, answer, held_out_prompts


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
    server = Server()
    server.config["replicas"]["num_replicas"] = arguments.replicas
    if arguments.num_gpus is not None:
        server.config["replicas"]["num_gpus"] = arguments.num_gpus
    started = time.perf_counter()
    server.start(held_out_prompts(1)[0], arguments.start_s)
    try:
        start_s = time.perf_counter() - started
        rows = asyncio.run(ask_all(server.url, server.base_model, arguments.requests, arguments.at_once))
    finally:
        server.stop()
    for row in rows:
        row["start_s"] = start_s
    Report("serve_smoke", device_name(device), rows).write(arguments.json)
    if any(row["exact"] < row["requests"] for row in rows):
        sys.exit("a text was wrong")


if __name__ == "__main__":
    main()

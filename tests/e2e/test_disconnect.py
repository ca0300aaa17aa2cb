"""A client that goes away takes its requests with it: rows, slot references and pages are free within a second."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from examples.demo.words import ADAPTERS, held_out_prompts

STREAMS = 24
LONG = {"max_tokens": 480, "ignore_eos": True, "temperature": 0}


def busy(stats):
    return {
        "rows": sum(one["running"] + one["waiting"] for one in stats),
        "slots": sum(one["slots_in_use"] for one in stats),
        "pages": sum(one["num_pages"] - one["free_pages"] for one in stats),
        "streams": sum(one["streams"] for one in stats),
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_frees_everything_within_a_second(server, other, stream):
    before = other.call("fleet_stats")
    assert not any(busy(before).values())
    bodies = [
        {"model": ADAPTERS[i % len(ADAPTERS)], "prompt": prompt, "stream": stream} | LONG
        for i, prompt in enumerate(held_out_prompts(STREAMS))
    ]
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        deadline = time.monotonic() + 20
        while (now := busy(other.call("fleet_stats")))["rows"] < STREAMS or not now["slots"]:
            assert time.monotonic() < deadline, now
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    left = time.monotonic()
    while any((now := busy(other.call("fleet_stats"))).values()):
        assert time.monotonic() - left < 1.0, now
        await asyncio.sleep(0.02)
    made = sum(one["generated_tokens"] for one in other.call("fleet_stats"))
    asked = STREAMS * LONG["max_tokens"]
    assert made - sum(one["generated_tokens"] for one in before) < asked, "they were stopped, not finished"

"""A replica is killed under load: nobody who had nothing yet loses anything, the others are told."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx

from examples.demo.words import ADAPTERS, STYLES, answer, held_out_prompts

from .traffic import Stream, model_of

LONG = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
SHORT = {"max_tokens": 80, "temperature": 0}


async def test_a_replica_killed_under_load(server, other):
    before = other.call("fleet_stats")
    assert len(before) == 2
    prompts = held_out_prompts(120)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=120) as client:
        # More long streams than there are rows, so that some have begun and some wait.
        streams = [Stream(client, ADAPTERS[i % 4], prompts[i], LONG) for i in range(40)]

        async def short(i):
            style = STYLES[i % 5]
            response = await client.post(
                "/v1/completions", json={"model": model_of(style), "prompt": prompts[40 + i]} | SHORT
            )
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"] == answer(prompts[40 + i], style)

        shorts = [asyncio.create_task(short(i)) for i in range(20)]
        deadline = time.monotonic() + 20
        while True:
            victim = max(other.call("fleet_stats"), key=lambda one: one["waiting"])
            if victim["waiting"] > 0 and sum(bool(stream.texts) for stream in streams) >= 16:
                break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        os.kill(victim["pid"], signal.SIGKILL)
        killed = time.monotonic()
        late = [asyncio.create_task(short(20 + i)) for i in range(10)]
        await asyncio.gather(*(stream.task for stream in streams))
        assert all(await asyncio.gather(*shorts, *late)), "every whole answer came, and exact"

    assert all(stream.status == 200 and stream.done for stream in streams)
    broken = [stream for stream in streams if stream.error is not None]
    assert 0 < len(broken) < len(streams)
    for stream in broken:
        assert stream.texts and stream.finish is None, "only what had begun may break"
        assert stream.error is not None and stream.error["code"] == "replica_died"
    assert all(stream.finish == "length" for stream in streams if stream.error is None)

    while len(now := other.call("fleet_stats")) < 2 or victim["pid"] in {one["pid"] for one in now}:
        assert time.monotonic() - killed < 60, "no replacement"
        await asyncio.sleep(0.25)
    replacement = next(one for one in now if one["pid"] not in {old["pid"] for old in before})
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as client:
        for i in range(30):
            style = STYLES[i % 5]
            body = {"model": model_of(style), "prompt": prompts[90 + i]} | SHORT
            response = await client.post("/v1/completions", json=body)
            assert response.json()["choices"][0]["text"] == answer(prompts[90 + i], style)
    served = next(one for one in other.call("fleet_stats") if one["replica"] == replacement["replica"])
    assert served["generated_tokens"] > 0

"""What may go away without anybody's request being lost: the hub, the controller, replicas that are replaced or too
many, and the whole server when it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx

from benchmarks.serving.server import Server
from examples.demo.words import ADAPTERS, answer

from .server import START_SECONDS
from .traffic import PROMPTS, Stream, Traffic
from .waiting import until

RESIDENT_AGAIN = 1.5  # longer than a router's own predictions last


async def killed(server, title):
    """Kill this process of the server's, and wait for the one that Ray or Serve puts in its place."""
    before = server.processes(title)
    victim = sorted(before)[0]
    os.kill(victim, signal.SIGKILL)
    return await asyncio.to_thread(
        until, lambda: server.processes(title), lambda now: victim not in now and len(now) >= len(before)
    )


def routed_by_news(other, prompt="robot, old, eats, school"):
    """Whether requests go where their adapters are, as a router can only know from news."""
    for adapter in ADAPTERS[:2]:
        other.call("generate", {"model": adapter, "prompt": prompt, "max_tokens": 1})
    time.sleep(RESIDENT_AGAIN)
    before = other.call("routing_counters")["resident"]
    for adapter in ADAPTERS[:2]:
        other.call("generate", {"model": adapter, "prompt": prompt, "max_tokens": 1})
    return other.call("routing_counters")["resident"] - before == 2


async def test_the_hub_is_killed(server, other):
    async with Traffic(server) as traffic:
        await killed(server, "FleetHub")
        await traffic.until_done(30)
    assert not traffic.wrong
    assert await asyncio.to_thread(until, lambda: routed_by_news(other))


async def test_the_controller_is_killed(server, other):
    async with Traffic(server) as traffic:
        await killed(server, "ServeController")
        await traffic.until_done(30)
    assert not traffic.wrong
    assert await asyncio.to_thread(until, lambda: routed_by_news(other))


async def test_every_process_is_replaced_and_a_replica_less_and_one_more(server, other):
    def replaced():
        return server.processes("LoraReplica").keys() | server.processes("Gateway").keys()

    async with Traffic(server, clients=12) as traffic:
        for args, replicas in (({"routing": {"spill_at": 0.9}}, 1), ({}, 2)):
            before = replaced()
            await asyncio.to_thread(server.deploy, replicas=replicas, **args)
            await asyncio.to_thread(
                until, replaced, lambda now, old=before, count=replicas: len(now) == count + 1 and not now & old, 120
            )
            await traffic.until_done(30)
    assert not traffic.wrong
    assert await asyncio.to_thread(until, lambda: routed_by_news(other))


async def test_running_streams_finish_or_are_told_when_the_server_stops():
    server = Server()
    server.config["replicas"] |= {"num_replicas": 1, "graceful_shutdown_timeout_s": 10}
    await asyncio.to_thread(server.start, PROMPTS[0], START_SECONDS)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as client:
        short = [Stream(client, "shout", prompt, {"max_tokens": 80, "temperature": 0}) for prompt in PROMPTS[:4]]
        long = {"max_tokens": 480, "ignore_eos": True, "temperature": 0}
        streams = short + [Stream(client, "shout", prompt, long) for prompt in PROMPTS[4:28]]
        try:
            async with asyncio.timeout(20):
                while not all(stream.texts for stream in streams[:8]):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        finally:
            stopped = asyncio.create_task(asyncio.to_thread(server.stop))
            await asyncio.gather(*(stream.task for stream in streams))
            await stopped
    for stream, prompt in zip(streams, PROMPTS, strict=False):
        code = stream.error and stream.error["code"]
        if stream.status == 503:  # it had not begun
            assert code in {"server_stopping", "replica_unavailable"} and not stream.texts
            continue
        assert stream.status == 200 and stream.done
        assert code in {None, "replica_died", "server_stopping"}
        assert (stream.finish is None) == (code is not None)
        text, right = "".join(stream.texts), answer(prompt, "shout")
        assert text.startswith(right) or (code is not None and right.startswith(text))
    assert all(stream.finish == "stop" for stream in short)

"""Requests through all gateways in turn, each answer held against its exact text."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.common.open_loop import offer
from benchmarks.common.workload import Arrival
from benchmarks.fleet_sim.traffic import gamma_traffic
from benchmarks.routing.tenants import Tenants
from benchmarks.serving.answer import Answer, Ending
from benchmarks.serving.openai_stream import OpenAIStream, session


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: its answer, the text it should have, and whether another gateway had to be asked, because the first
    one's node was gone before it had sent anything. That much any load balancer does."""

    answer: Answer
    expected: str
    moved: bool = False

    @property
    def begun(self) -> bool:
        return bool(self.answer.events)

    @property
    def whole(self) -> bool:
        return self.answer.ending is Ending.WHOLE

    @property
    def exact(self) -> bool:
        """Whether what came is what should have come, as far as it came."""
        return self.expected.startswith(self.answer.text) and (not self.whole or self.answer.text == self.expected)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Each adapter's requests come by a Gamma process of its own, at rates by Zipf's law that add up to ``rate``.

    shape: of the times between requests of one adapter: 1 is Poisson, below 1 they come in bursts.
    """

    tenants: Tenants
    rate: float
    zipf: float
    shape: float
    timeout_s: float = 60.0

    def arrivals(self, warm: int, count: int, seed: int) -> tuple[list[Arrival], list[Arrival]]:
        """The first ``warm`` of them and the next ``count``, each from when it begins; the same for the same seed."""
        made = self._arrivals(warm + count, seed)
        first = made[warm].at if count else 0.0
        return made[:warm], [replace(one, at=one.at - first) for one in made[warm:]]

    def _arrivals(self, count: int, seed: int) -> list[Arrival]:
        enough, names, tokens = 2.0 * count / self.rate + 10.0, self.tenants.names, self.tenants.tokens
        made = gamma_traffic(len(names), self.zipf, self.rate, enough, self.shape, tokens, seed)
        rng = random.Random(seed)
        return [
            Arrival(at, names[adapter], tokens, tokens, rng.getrandbits(48))
            for at, adapter in zip(made.times[:count].tolist(), made.adapters[:count].tolist(), strict=True)
        ]

    async def offer(self, urls: Sequence[str], application: str, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Send all to the application, gateway by gateway, and wait for their ends."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(session(f"{url}/{application}/")) for url in urls]
            streams = [OpenAIStream(client, "completions", self.timeout_s) for client in clients]
            turns = itertools.count()

            async def send(arrival: Arrival, due: float) -> Outcome:
                prompt, expected = self.tenants.question(arrival.model, arrival.seed)
                turn = next(turns)
                answer = await streams[turn % len(streams)].ask(arrival.model, prompt, arrival.output_tokens, due)
                moved = gateway_lost(answer) and len(streams) > 1
                if moved:
                    other = streams[(turn + 1) % len(streams)]
                    answer = await other.ask(arrival.model, prompt, arrival.output_tokens, time.perf_counter())
                return Outcome(answer, expected, moved)

            _, outcomes = await offer(arrivals, send)
            return outcomes


def gateway_lost(answer: Answer) -> bool:
    """Before anything came: no connection, or a Serve proxy's own 500, which unlike ours is no JSON. It says so when
    the gateway that it had chosen dies."""
    if answer.events:
        return False
    own = '{"error"' in (answer.error or "")
    return answer.ending is Ending.CUT or (answer.ending is Ending.REFUSED and not own)


async def wait_for(urls: Sequence[str], application: str, seconds: float = 60.0) -> None:
    """Until every gateway's proxy knows the application. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        for url in urls:
            async with session(f"{url}/{application}/") as client:
                while True:
                    with contextlib.suppress(OSError):
                        async with client.get("v1/models") as answer:
                            if answer.ok:
                                break
                    await asyncio.sleep(0.2)

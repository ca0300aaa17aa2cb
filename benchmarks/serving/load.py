"""The load of one benchmark, offered to one server: rate by rate, by several client processes."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from benchmarks.common.lengths import Lengths
from benchmarks.common.report import Row
from benchmarks.common.workload import Workload
from benchmarks.serving.answer import Answer
from benchmarks.serving.client import ClientProcesses, Job
from benchmarks.serving.fleet_stats import FleetStats, Reading, between
from benchmarks.serving.openai_stream import Api, OpenAIStream, session
from benchmarks.serving.prompt_text import PromptText, words
from benchmarks.serving.served_models import ServedModels
from benchmarks.serving.server import Server
from benchmarks.serving.slo import Slo

FIT_WORDS = 8, 40
SETTLED = 0.25  # share of the arrivals after which engines are looked at
LEAD_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server of our own under load."""

    replicas: int
    gateways: int
    server: Server
    stats: FleetStats


@dataclass(frozen=True, slots=True)
class Load:
    """rates: requests a second for each replica, one after another, each for ``duration`` seconds. until: the moment of
    ``time.perf_counter`` at which all must be over."""

    rates: Sequence[float]
    duration: float
    clients: int
    zipf: float
    prompt: Lengths
    output: Lengths
    seed: int
    api: Api
    timeout_s: float
    slo: Slo
    prefix: str | None
    until: float

    @classmethod
    def of(cls, arguments: argparse.Namespace, until: float) -> Load:
        """From the command line."""
        same = ("duration", "clients", "zipf", "prompt", "output", "seed", "api", "timeout_s", "prefix")
        slo = Slo(arguments.slo_ttft_ms, arguments.slo_itl_ms)
        return cls(arguments.rate, slo=slo, until=until, **{name: getattr(arguments, name) for name in same})

    @property
    def seconds(self) -> float:
        """Least time that one rate takes."""
        return self.duration + LEAD_SECONDS

    async def measure(
        self, url: str, adapters: int | None, keep: Callable[[Row], None], fleet: Fleet | None = None
    ) -> None:
        """One row a rate for ``keep``. adapters: how many take part, None for all. fleet: what is known of the server.

        Raises RuntimeError when the server does not answer.
        """
        async with session(url) as client:
            async with client.get("v1/models", raise_for_status=True) as listed:
                models = ServedModels.from_list(await listed.json())
            text = await fit_prompts(OpenAIStream(client, self.api, self.timeout_s), models.base)
        names = models.chosen(adapters, self.prefix)
        workload = Workload(names, self.zipf, self.prompt, self.output)
        for rate in (rate * (fleet.replicas if fleet else 1) for rate in self.rates):
            if self.until - time.perf_counter() < self.seconds:
                print(f"no time left for rate {rate:g}", file=sys.stderr, flush=True)
                break
            job = Job(
                url, self.api, self.timeout_s, self.until, text, workload.arrivals(rate, self.duration, self.seed)
            )
            told: Row = {"rate": rate, "duration_s": self.duration, "zipf": self.zipf}
            told["adapters"] = 0 if names == [models.base] else len(names)
            start, answers, counted = await self._offer(job, fleet)
            keep(told | counted | self.slo.summarize(answers, start, self.duration))
            print_errors(rate, answers)

    async def _offer(self, job: Job, fleet: Fleet | None) -> tuple[float, list[Answer], Row]:
        async with ClientProcesses.started(job.shared(self.clients)) as clients:
            start = time.perf_counter() + LEAD_SECONDS
            watching = asyncio.create_task(self._watch(fleet, clients.pids, start))
            answers = await clients.answers(start)
            return start, answers, await watching

    async def _watch(self, fleet: Fleet | None, clients: Sequence[int], start: float) -> Row:
        """What the server's engines and processes do from the first quarter of the arrivals to their end."""
        if fleet is None:
            return {}
        looks: list[tuple[Reading, dict[str, float]]] = []
        for share in (SETTLED, 1.0):
            await asyncio.sleep(max(start + share * self.duration - time.perf_counter(), 0.0))
            reading, busy = await asyncio.gather(
                asyncio.to_thread(fleet.stats.read), asyncio.to_thread(fleet.server.cpu_seconds)
            )
            looks.append((reading, busy | {"client": cpu_seconds(clients)}))
        (first, idle), (last, busy) = looks
        seconds = last.at - first.at
        cores = {f"cores_{kind}": (busy[kind] - idle[kind]) / seconds for kind in busy}
        return {"replicas": fleet.replicas, "gateways": fleet.gateways} | between(first, last) | cores


async def fit_prompts(stream: OpenAIStream, model: str) -> PromptText:
    """How many tokens this server's tokenizer takes for a word. Raises RuntimeError when it does not answer."""
    points: list[tuple[int, int]] = []
    for count in FIT_WORDS:
        answer = await stream.ask(model, words(count, 0), 2, time.perf_counter())
        if answer.error is not None:
            raise RuntimeError(f"{model} did not answer: {answer.error}")
        points.append((count, answer.prompt_tokens))
    return PromptText.fitted(*points)


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time so far of these processes of ours, and of this one."""
    times = [psutil.Process(pid).cpu_times() for pid in (*pids, os.getpid())]
    return sum(each.user + each.system for each in times)


def print_errors(rate: float, answers: Sequence[Answer]) -> None:
    """The commonest errors of one rate, with their counts."""
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    for error, count in errors.most_common(5):
        print(f"rate {rate:g}: {count} x {error}", file=sys.stderr, flush=True)

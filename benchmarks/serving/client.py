"""Client processes: a rate of arrivals is shared among several, so that no Python interpreter is what is measured.

A client reads a pickled ``Job``, says that it is ready, reads when to start, and writes its pickled answers. It imports
no more than it needs, so it is up in no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.open_loop import offer
from benchmarks.common.workload import Arrival
from benchmarks.serving.answer import Answer
from benchmarks.serving.openai_stream import Api, OpenAIStream, session
from benchmarks.serving.prompt_text import PromptText

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Job:
    """What one client sends, and to whom. until: see ``OpenAIStream``; moments of ``time.perf_counter`` are the same in
    every process of a machine."""

    url: str
    api: Api
    timeout_s: float
    until: float
    text: PromptText
    arrivals: Sequence[Arrival]

    def shared(self, count: int) -> list[Job]:
        """The same job for ``count`` clients, each with every count-th arrival."""
        parts = (self.arrivals[number::count] for number in range(count))
        return [Job(self.url, self.api, self.timeout_s, self.until, self.text, part) for part in parts]


async def work(job: Job, start: float | None = None) -> tuple[float, list[Answer]]:
    """Send all of it; the moment that arrivals count from, and the answers in order."""
    async with session(job.url) as client:
        stream = OpenAIStream(client, job.api, job.timeout_s, job.until)

        async def send(arrival: Arrival, due: float) -> Answer:
            prompt = job.text.make(arrival.prompt_tokens, arrival.seed)
            return await stream.ask(arrival.model, prompt, arrival.output_tokens, due)

        return await offer(job.arrivals, send, start)


class ClientProcesses:
    """One process a job, ready to start. ``async with ClientProcesses.started(jobs) as clients``."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, jobs: Sequence[Job]) -> AsyncIterator[ClientProcesses]:
        """Start them and wait until all are ready; what still runs at the end is killed."""
        processes = [_client() for _ in jobs]
        try:
            for process, job in zip(processes, jobs, strict=True):
                _write(process.stdin, job)
            for process in processes:
                await asyncio.to_thread(_read, process.stdout)
            yield cls(processes)
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    async def answers(self, start: float) -> list[Answer]:
        """Let all begin at ``start`` and wait for their ends."""
        for process in self._processes:
            _write(process.stdin, start)
        parts = [await asyncio.to_thread(_read, process.stdout) for process in self._processes]
        return [answer for part in parts for answer in part]


def main() -> None:
    """A client process."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    job: Job = pickle.load(source)
    _write(target, "ready")
    _, answers = asyncio.run(work(job, pickle.load(source)))
    _write(target, answers)


def _client() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from benchmarks.serving.client import main; main()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)


def _read(stream: Any) -> Any:
    return pickle.load(stream)


def _write(stream: Any, what: object) -> None:
    pickle.dump(what, stream)
    stream.flush()

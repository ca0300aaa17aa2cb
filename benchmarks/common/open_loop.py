"""Requests sent when they are due, however late the answers are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from benchmarks.common.workload import Arrival

Result = TypeVar("Result")


async def offer(
    arrivals: Sequence[Arrival],
    send: Callable[[Arrival, float], Coroutine[Any, Any, Result]],
    start: float | None = None,
) -> tuple[float, list[Result]]:
    """Call ``send(arrival, due)`` for each when it is due (``time.perf_counter``), never waiting for another's answer.

    Returns when all are answered: the moment that arrival times count from (``start``, or now), and the answers in
    order.
    A ``due`` that has passed, because this process was busy, is kept as it is: measured from there, a delay shows.
    """
    start = time.perf_counter() if start is None else start
    tasks: list[asyncio.Task[Result]] = []
    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            due = start + arrival.at
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            tasks.append(group.create_task(send(arrival, due)))
    return start, [task.result() for task in tasks]

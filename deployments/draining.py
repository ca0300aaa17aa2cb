"""The end of a Serve replica that was told to stop: what runs may finish, and what cannot is told so in time.

Serve waits for requests that run, and after ``graceful_shutdown_timeout_s`` kills the process without a word. It has no
public way for a replica to learn that it was told to stop before all requests are done, so ``told_to_stop`` reads a
private field of Serve 2.60; where that is gone nothing is told ahead, and the rest is as before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ray._private.worker import global_worker

from deployments.background import Background

LOOK_SECONDS = 0.25
LAST_CALL_SECONDS = 3.0  # before the kill; Serve looks every 2 s whether all requests are done

logger = logging.getLogger("ray.serve")


def told_to_stop() -> bool:
    """Whether Serve has begun to shut down the replica in this process."""
    replicas = (getattr(actor, "_replica_impl", None) for actor in global_worker.actors.values())
    return any(getattr(replica, "_shutting_down", False) for replica in replicas)


class Drain(Background):
    """Calls ``begins`` once when the replica was told to stop, and ``last_call`` shortly before it is killed, again
    and again, for requests may still come."""

    def __init__(
        self,
        grace_s: float,
        last_call: Callable[[], None],
        begins: Callable[[], None] = lambda: None,
        told: Callable[[], bool] = told_to_stop,
    ) -> None:
        """grace_s: the deployment's ``graceful_shutdown_timeout_s``."""
        self._wait_s = max(grace_s / 2, grace_s - LAST_CALL_SECONDS)
        self._last_call = last_call
        self._begins = begins
        self._told = told

    async def _run(self) -> None:
        while not self._told():  # noqa: ASYNC110 (Serve tells nobody)
            await asyncio.sleep(LOOK_SECONDS)
        logger.info("told to stop: requests that run have %.1f s", self._wait_s)
        self._begins()
        await asyncio.sleep(self._wait_s)
        while True:
            self._last_call()
            await asyncio.sleep(LOOK_SECONDS)

"""How many replicas there are by Serve's word: also those that start or stop, which answer nobody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from ray import serve

AGE_SECONDS = 3.0

logger = logging.getLogger("ray.serve")


class ServeStates:
    """Asks Serve's controller now and then, beside what reads it: a controller that is slow holds up nobody."""

    def __init__(self, app_name: str, deployment: str) -> None:
        self._app_name = app_name
        self._deployment = deployment
        self._known: Mapping[str, int] = {}
        self._asked = -AGE_SECONDS
        self._task: asyncio.Task[None] | None = None

    async def read(self) -> Mapping[str, int]:
        """What was heard last, by state, such as RUNNING, STARTING, STOPPING; empty before the first answer."""
        if (self._task is None or self._task.done()) and time.monotonic() - self._asked >= AGE_SECONDS:
            self._asked = time.monotonic()
            self._task = asyncio.create_task(self._ask())
        return self._known

    async def _ask(self) -> None:
        try:
            status = await asyncio.to_thread(serve.status)
        except Exception as error:  # the page does without
            logger.info("Serve does not say how its replicas are: %s", error)
            self._known = {}
            return
        application = status.applications.get(self._app_name)
        found = None if application is None else application.deployments.get(self._deployment)
        self._known = {} if found is None else {str(state): count for state, count in found.replica_states.items()}

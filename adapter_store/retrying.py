"""Trying again what may succeed the next time, with pauses, a bounded number of times."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from adapter_store.errors import AdapterError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


class Passing(Exception):
    """A failure that may pass. retry_after_s: the pause that the other side asked for, 0 for none."""

    def __init__(self, failure: AdapterError, retry_after_s: float = 0.0) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.retry_after_s = retry_after_s


def keep_trying(work: Callable[[], T], retries: int, deadline: float | None = None) -> T:
    """``work``'s result, with up to ``retries`` further tries when it raises Passing.

    Pauses double from 0.2 s, jittered, up to 5 s. deadline: monotonic seconds after which no try begins. Raises the
    last Passing's failure, and whatever else ``work`` raises.
    """
    pause = _FIRST_PAUSE_S
    for attempt in range(retries + 1):
        try:
            return work()
        except Passing as passing:
            failure, asked_pause = passing.failure, passing.retry_after_s
        wait = min(max(asked_pause, pause * random.uniform(0.5, 1.0)), _LONGEST_PAUSE_S)  # noqa: S311 - jitter
        if attempt == retries or (deadline is not None and time.monotonic() + wait > deadline):
            raise failure from None
        _log.info("%s; trying again in %.1f s", failure.reason, wait)
        time.sleep(wait)
        pause *= 2
    raise AssertionError("the loop returns or raises")

"""Waiting for what comes about in its own time, in a real cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(look: Callable[[], T], holds: Callable[[T], object] = bool, seconds: float = 60.0) -> T:
    """What ``look`` sees once it ``holds``. An AssertionError shows what was seen last."""
    deadline = time.monotonic() + seconds
    while not holds(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return seen

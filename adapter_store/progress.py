"""How far long transfers are: a bar for who watches a terminal, a line now and then for who reads a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm

_log = logging.getLogger(__name__)
_PATIENCE_S = 2.0  # what is done sooner is not worth a line
_LOG_EVERY_S = 10.0


class Progress:
    """Bytes moved for one piece of work; a context manager, for one thread.

    what: names the work in front of the bar or in the log, such as "loading model.safetensors". total: bytes, None
    where nobody knows. Nothing is shown of work that takes less than two seconds. A terminal on stderr gets a bar;
    otherwise a line is logged every ten seconds.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._began = time.monotonic()
        self._done, self._told = 0, self._began + _PATIENCE_S - _LOG_EVERY_S
        self._bar: tqdm[NoReturn] | None = None  # it counts, and iterates over nothing
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, delay=_PATIENCE_S, leave=False
            )

    def advance(self, count: int) -> None:
        """``count`` bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._told >= _LOG_EVERY_S:
            self._told = now
            _log.info("%s: %s", self._what, self._said(now))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _said(self, now: float) -> str:
        speed = self._done / max(now - self._began, 1e-9)
        done = f"{self._done / 2**20:.0f} MiB"
        if not self._total:
            return f"{done}, {speed / 2**20:.1f} MiB/s"
        left = (self._total - self._done) / speed if speed else float("inf")
        of = f"{done} of {self._total / 2**20:.0f} ({100 * self._done / self._total:.0f} %)"
        return f"{of}, {speed / 2**20:.1f} MiB/s, {left:.0f} s left"

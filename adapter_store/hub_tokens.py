"""Whose token an exchange with the Hub is made with. None is logged, and none is kept longer than what needs it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef


class HubTokens:
    """This server's own token, from the environment at each exchange, so that it can be rotated; and those of callers.
    Thread-safe."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._caller = threading.local()
        self._lock = threading.Lock()
        self._lent: dict[AdapterRef, list[str]] = {}

    def of(self, ref: AdapterRef) -> str | bool:
        """For an exchange of this thread about ``ref``; False for none at all."""
        token: str | None = getattr(self._caller, "token", None)
        if token is None:
            with self._lock:
                token = next(iter(self._lent.get(ref, ())), None)
        if token is None:
            token = os.environ.get(self._settings.token_variable(ref))
        # False keeps the library from sending a token saved on this machine for something else.
        return token or False

    @contextmanager
    def as_caller(self, token: str) -> Iterator[None]:
        """Exchanges of this thread are made with a caller's token; an empty one is none."""
        self._caller.token = token
        try:
            yield
        finally:
            del self._caller.token

    @contextmanager
    def lent(self, ref: AdapterRef, token: str) -> Iterator[None]:
        """Exchanges of any thread about ``ref``, which is pinned, are made with the token of a caller that was shown
        it."""
        with self._lock:
            self._lent.setdefault(ref, []).append(token)
        try:
            yield
        finally:
            with self._lock:
                self._lent[ref].remove(token)
                if not self._lent[ref]:
                    del self._lent[ref]

    def is_lent(self, ref: AdapterRef) -> bool:
        """Whether a caller's token is used for ``ref`` now, so that a failure is that caller's alone."""
        with self._lock:
            return ref in self._lent

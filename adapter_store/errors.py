"""What can go wrong with an adapter, as the caller should see it."""

from __future__ import annotations


class AdapterError(Exception):
    """Base of all adapter errors. ``adapter`` is the name the caller used, ``reason`` says what to do."""

    def __init__(self, adapter: str, reason: str) -> None:
        super().__init__(f"adapter {adapter!r}: {reason}")
        self.adapter = adapter
        self.reason = reason

    def named(self, adapter: str) -> AdapterError:
        """A new error that says the same of the same content, under the name that its reader used for it.

        Without cause or traceback, so that it may be kept: those hold the frames, and what was in them.
        """
        return type(self)(adapter, self.reason)

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        # Exceptions with two arguments do not survive pickling (Ray) without this.
        return (type(self), (self.adapter, self.reason))


class AdapterNotFound(AdapterError):
    """No such adapter, or the client may not name it (HTTP 404)."""


class AdapterRefused(AdapterError):
    """The adapter exists but cannot be applied whole, so it is not applied at all (HTTP 422)."""


class AdapterUnavailable(AdapterError):
    """Its source did not answer in time or failed; trying again may help (HTTP 503)."""


class PinRefused(AdapterError):
    """No slot can be kept for this adapter for good (HTTP 409)."""


class AdapterChanged(AdapterError):
    """The content found is not the content that was asked for by digest: resolve again (internal retry)."""

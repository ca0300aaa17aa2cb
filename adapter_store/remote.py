"""What a source on a network needs of the server's protocol."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapter_store.source import AdapterRef, TemplateFile


@dataclass(frozen=True, slots=True)
class Listing:
    """What a server says of an adapter without sending it.

    ref: what was asked for, with the commit where the server has commits. state: 64 hex digits that are others as soon
    as the content is, None when the server says nothing that could tell. digest: the content's, None when the server
    does not say so. weights_bytes: None when unknown. template: where a chat template may be.
    """

    ref: AdapterRef
    state: str | None
    digest: str | None
    weights_bytes: int | None
    template: TemplateFile | None = None


class RemoteClient(Protocol):
    """Exchanges with one kind of server, with limits on time, tries and size. Thread-safe."""

    @property
    def immutable(self) -> bool:
        """Whether a pinned reference has the same content for ever, so that other content is a fault."""
        ...

    def listing(self, name: str, ref: AdapterRef, retries: int | None = None) -> Listing:
        """What ``ref`` is now. retries: fewer than the settings'.

        Raises AdapterNotFound, AdapterRefused (no adapter there) or AdapterUnavailable.
        """
        ...

    def is_lent(self, ref: AdapterRef) -> bool:
        """Whether ``ref`` is read with a caller's credentials now, so that a failure is that caller's alone."""
        ...

    def pin(self, listing: Listing, digest: str) -> AdapterRef:
        """The reference of just this content."""
        ...

    def download(self, name: str, ref: AdapterRef, folder: Path, limit: int) -> str | None:
        """Write both files of a pinned reference to ``folder`` and return the state that they were in.

        Raises what ``listing`` raises, and AdapterRefused when the weights are larger than ``limit`` bytes.
        """
        ...

    def read(self, name: str, ref: AdapterRef, file: str, limit: int) -> bytes:
        """A small file beside those two. Raises what ``listing`` raises, and AdapterRefused when it has more than
        ``limit`` bytes."""
        ...


def state_key(*parts: str) -> str:
    """64 hex digits for a state that these texts name together."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()

"""Where an adapter comes from and which content exactly: references, and what a source must do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from adapter_store.checkpoint_files import CheckpointFiles
    from adapter_store.load_stats import SourceStats

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Where an adapter is kept: ``local:<folder>`` or ``hub:<org>/<name>[@<revision>]``."""

    source: Literal["local", "hub"]
    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read the string form.

        Raises ValueError when the scheme is neither ``local:`` nor ``hub:``, or the repository id or revision
        could not be one (so that a reference can never climb out of the Hub's API paths).
        """
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in {"local", "hub"}:
            raise ValueError(f"adapter reference {text!r} must start with 'local:' (a folder) or 'hub:' (org/name@rev)")
        if scheme == "local":
            if not rest or "\0" in rest:
                raise ValueError(f"adapter reference {text!r} names no folder; write local:/path/to/adapter")
            return cls("local", rest)
        repo, at, revision = rest.partition("@")
        if not _REPO_ID.fullmatch(repo) or ".." in repo or "--" in repo:
            raise ValueError(
                f"adapter reference {text!r} names no Hub repository; write hub:org/name or hub:org/name@rev"
            )
        if at and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise ValueError(f"adapter reference {text!r} has no valid revision after '@': a branch, tag or commit")
        return cls("hub", repo, revision or None)

    @property
    def pinned(self) -> bool:
        """Whether the reference names one commit for ever (a local folder never does)."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{self.source}:{self.id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """A name that was looked up: where the content is and which content it is.

    ``name`` is what the caller asked for. ``ref`` is pinned to a commit where the source has commits.
    ``digest`` identifies the content (see ``digest.content_digest``); every cache is keyed by it.
    """

    name: str
    ref: AdapterRef
    digest: str


class AdapterSource(Protocol):
    """What the catalog and the store need of a place that keeps adapters. Implementations are thread-safe."""

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """Find the content that ``ref`` names now, cheaply where nothing changed.

        Raises AdapterNotFound, AdapterRefused or AdapterUnavailable.
        """
        ...

    def fetch(self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None) -> CheckpointFiles:
        """Read the content, verified against the digest.

        Raises what ``resolve`` raises, AdapterRefused when the weights file is larger than ``max_weights_bytes``, and
        AdapterChanged when the content is no longer the resolved one.
        """
        ...

    def at_hand(self, digest: str | None) -> bool:
        """Whether ``fetch`` of this content needs no network. May be wrong by the time it is called."""
        ...

    def forget(self, ref: AdapterRef) -> None:
        """Drop what is remembered of the reference, so that the next ``resolve`` looks anew."""
        ...

    def stats(self) -> SourceStats:
        """What it did so far."""
        ...

    def close(self) -> None:
        """Give back what the source holds open."""
        ...

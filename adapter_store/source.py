"""Where an adapter comes from and which content exactly: references, and what a source must do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from adapter_store.checkpoint_files import CheckpointFiles, Meanwhile
    from adapter_store.load_stats import SourceStats
    from adapter_store.template_files import Templates

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# One part of an object's key. Without what file systems, chained URLs or proxies could read as something else.
_URL_PART = re.compile(r"[^\x00-\x20\x7f/\\*?\[\]{}#%:@]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """Where an adapter is kept: a folder, a repository of the Hub, or a prefix in an object store; or what it is made
    of.

    Written ``local:<folder>``, ``hub:<org>/<name>[@<revision>]``, or ``<scheme>://<bucket>/<prefix>[@<digest>]`` with
    any scheme of fsspec, such as ``s3`` or ``gs``. ``source`` is ``local``, ``hub`` or the scheme. The revision of an
    object store is the content digest that the files must have. ``merge:<JSON>`` is several others: see
    ``merging_recipe.Merge`` and ``references``; it has a digest for a revision as soon as all of theirs stand in it.
    """

    source: str
    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read the string form of any but a merge (see ``references.parse_reference``).

        Raises ValueError for another scheme, or a repository, path or revision that could not be one (so that a
        reference can never climb out of what an allow-list pattern or a server's API path means).
        """
        url = _URL.fullmatch(text)
        if url is not None:
            return cls._parse_url(url["scheme"], url["rest"])
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in {"local", "hub"}:
            raise ValueError(
                f"adapter reference {text!r} must start with 'local:' (a folder), 'hub:' (org/name@rev) or a scheme "
                "such as 's3://' (bucket/prefix)"
            )
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

    @classmethod
    def _parse_url(cls, scheme: str, rest: str) -> AdapterRef:
        path, at, revision = rest.partition("@")
        if "@" in rest.partition("/")[0] and not _DIGEST.fullmatch(revision):
            raise ValueError(  # without the text, which may hold a password
                f"an adapter reference {scheme}://...@... must hold no credentials; name environment variables in "
                "store.sources"
            )
        text, path = f"{scheme}://{rest}", path.removesuffix("/")
        parts = path.removeprefix("/").split("/") if scheme == "file" else path.split("/")
        if scheme in {"local", "hub", "merge"} or not all(
            _URL_PART.fullmatch(p) and p not in {".", ".."} for p in parts
        ):
            raise ValueError(
                f"adapter reference {text!r} names no folder of an object store; write {scheme}://bucket/prefix "
                "without '.', '..', empty parts, spaces, or any of * ? [ ] { } # % : @ \\"
            )
        if at and not _DIGEST.fullmatch(revision):
            raise ValueError(
                f"adapter reference {text!r} has no valid revision after '@': in an object store that is the content "
                "digest, 64 hex digits, and a path can hold no '@'"
            )
        return cls(scheme, path, revision or None)

    @staticmethod
    def is_url(text: str) -> bool:
        """Whether this is meant as the reference of an object store, well-formed or not."""
        return _URL.fullmatch(text) is not None

    @classmethod
    def is_meant(cls, text: str) -> bool:
        """Whether this is meant as a reference at all, and not as a name."""
        return text.startswith(("local:", "hub:", "merge:")) or cls.is_url(text)

    @property
    def pinned(self) -> bool:
        """Whether the reference names one content for ever (a local folder never does)."""
        return self.digest is not None or (
            self.source == "hub" and self.revision is not None and _COMMIT.fullmatch(self.revision) is not None
        )

    @property
    def digest(self) -> str | None:
        """The content digest that the reference itself is pinned to."""
        return self.revision if self.source not in {"local", "hub"} else None

    @property
    def unpinned(self) -> AdapterRef:
        """The same place, whatever is there."""
        return AdapterRef(self.source, self.id)

    @property
    def owner(self) -> str:
        """Whose server or account it is on: ``local``, ``hub:org``, ``s3://bucket``. Of a merge see
        ``references.owner_of``."""
        first = self.id.partition("/")[0]
        return "local" if self.source == "local" else f"{self.source}{self._separator}{first}"

    @property
    def _separator(self) -> str:
        return ":" if self.source in {"local", "hub", "merge"} else "://"

    def __str__(self) -> str:
        said = self.revision is not None and self.source != "merge"
        return f"{self.source}{self._separator}{self.id}" + (f"@{self.revision}" if said else "")


@dataclass(frozen=True, slots=True)
class TemplateFile:
    """A file that an adapter's chat template may be in, one of ``TEMPLATE_FILES``, and what tells one state of it from
    the next."""

    file: str
    version: str


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """A name that was looked up: where the content is and which content it is.

    ``name`` is what the caller asked for. ``ref`` is pinned, to a commit or a digest, unless it is a local folder.
    ``digest`` identifies the content (see ``digest.content_digest``); every cache is keyed by it. ``template`` is where
    a chat template of its own may be, and in which state.
    """

    name: str
    ref: AdapterRef
    digest: str
    template: TemplateFile | None = None


class AdapterSource(Protocol):
    """What the catalog and the store need of a place that keeps adapters. Implementations are thread-safe."""

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """Find the content that ``ref`` names now, cheaply where nothing changed.

        Raises AdapterNotFound, AdapterRefused or AdapterUnavailable.
        """
        ...

    def recall(self, name: str, ref: AdapterRef) -> ResolvedAdapter | None:
        """What ``resolve`` would answer from memory; None when it would have to look. Never blocks.

        Raises what is remembered of a failure.
        """
        ...

    def fetch(
        self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """Read the content, verified against the digest.

        meanwhile: where the files are on this machine, it is called with them while they are hashed. They may turn out
        to be others than those that are returned.

        Raises what ``resolve`` raises, AdapterRefused when the weights file is larger than ``max_weights_bytes``, and
        AdapterChanged when the content is no longer the resolved one.
        """
        ...

    def templates(self, resolved: ResolvedAdapter) -> Templates:
        """Read what ``resolved.template`` says. Raises what ``resolve`` raises."""
        ...

    def at_hand(self, ref: AdapterRef, digest: str | None) -> bool:
        """Whether ``fetch`` of this content needs no network, be it that it fails from memory. May be wrong by the time
        it is called."""
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

"""Merges as a source of adapters: what they are now follows from what their parts are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from adapter_store.checkpoint_files import CheckpointFiles, Meanwhile
from adapter_store.errors import AdapterError, AdapterRefused
from adapter_store.load_stats import SourceStats
from adapter_store.merging_recipe import Merge, MergePart
from adapter_store.references import parts_of
from adapter_store.source import AdapterRef, AdapterSource, ResolvedAdapter
from adapter_store.template_files import Templates

T = TypeVar("T")


class MergingSource:
    """Asks the sources of the parts, and keeps nothing itself. Thread-safe.

    An error of a part is the merge's, with the part's name in the reason.
    """

    def __init__(self, source_of: Callable[[AdapterRef], AdapterSource]) -> None:
        self._of = source_of

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """What the parts are now, in a reference that is pinned to it. Raises what theirs raise."""
        merge = Merge.of(ref)
        return merge.resolved(name, [self._ask(name, part, self._resolve_part) for part in merge.parts])

    def recall(self, name: str, ref: AdapterRef) -> ResolvedAdapter | None:
        """The same, where all parts are remembered."""
        merge = Merge.of(ref)
        known = [self._ask(name, part, self._recall_part) for part in merge.parts]
        found = [one for one in known if one is not None]
        return merge.resolved(name, found) if len(found) == len(known) else None

    def fetch(
        self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """Refused: ``merging.pack_merged`` fetches the parts."""
        del max_weights_bytes, meanwhile
        raise AdapterRefused(resolved.name, "a merge has no files of its own: fetch what it is made of")

    def templates(self, resolved: ResolvedAdapter) -> Templates:
        """None: nobody says which part's it would be."""
        del resolved
        return {}

    def at_hand(self, ref: AdapterRef, digest: str | None) -> bool:
        """Whether every part is."""
        del digest
        return all(self._of(part.ref).at_hand(part.ref, part.digest) for part in Merge.of(ref).parts if part.ref)

    def forget(self, ref: AdapterRef) -> None:
        """Have every part looked up anew."""
        for part in parts_of(ref):
            self._of(part).forget(part)

    def stats(self) -> SourceStats:
        """Nothing: the parts' sources count."""
        return SourceStats()

    def close(self) -> None:
        """Nothing is held open."""

    def _ask(self, name: str, part: MergePart, look: Callable[[MergePart, AdapterRef], T]) -> T:
        assert part.ref is not None
        try:
            return look(part, part.ref)
        except AdapterError as error:
            raise part.error(name, error) from error

    def _resolve_part(self, part: MergePart, ref: AdapterRef) -> ResolvedAdapter:
        return self._of(ref).resolve(part.name, ref)

    def _recall_part(self, part: MergePart, ref: AdapterRef) -> ResolvedAdapter | None:
        return self._of(ref).recall(part.name, ref)

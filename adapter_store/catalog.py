"""Which adapters there are, what a client may name, and the content behind each name."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from adapter_store.checkpoint_files import CheckpointFiles, Meanwhile
from adapter_store.merging_recipe import Merge
from adapter_store.names import AdapterNames, NamedAdapter
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, ResolvedAdapter
from adapter_store.sources import Sources

_MAX_KNOWN = 16_384  # references whose digest is remembered for listings; a few hundred bytes each


class Catalog:
    """Names to content. Thread-safe; what there is can be changed while it is used (see ``AdapterNames``)."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ValueError when a folder of the settings does not exist."""
        self._settings = settings
        self._runtime: Mapping[str, AdapterRef] = {}
        self._names = AdapterNames(settings)
        self.sources = Sources(settings)
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterRef, str] = OrderedDict()  # digest by the reference that was asked for

    def reconfigure(self, settings: StoreSettings) -> None:
        """Take over ``adapters``, ``folders`` and ``allow``; everything else stays as it was.

        Raises ValueError when they hold a mistake or a folder that does not exist; nothing has changed then.
        """
        changed = replace(
            self._settings, adapters=dict(settings.adapters), folders=settings.folders, allow=settings.allow
        )
        with self._lock:
            self._names = AdapterNames(changed).with_runtime(self._runtime)
            self._settings = changed

    def declare(self, runtime: Mapping[str, AdapterRef]) -> None:
        """Replace the adapters that were declared at run time; the settings' own come first where names are equal."""
        with self._lock:
            self._runtime = dict(runtime)
            self._names = self._names.with_runtime(self._runtime)

    def names(self) -> list[str]:
        """Every adapter that has a name, sorted: declared ones and those found in folders now."""
        return self._names.names()

    def find(self, name: str) -> AdapterRef:
        """Where the adapter a client calls ``name`` is kept. Raises AdapterNotFound; touches no network."""
        return self._names.find(name).ref

    def named(self, name: str) -> NamedAdapter:
        """The same, with where the name comes from."""
        return self._names.find(name)

    def name_of(self, ref: AdapterRef) -> str | None:
        """A name that stands for this place; None when there is none. Asks nobody."""
        return self._names.name_of(ref)

    def resolve(self, name: str) -> ResolvedAdapter:
        """Find the content that a client's ``name`` means now.

        A folder costs a few stats; the Hub is asked at most once per ``hub_refresh_s`` and blocks up to its timeouts,
        so call it from a worker thread. Raises AdapterNotFound, AdapterRefused or AdapterUnavailable.
        """
        return self.resolve_ref(name, self.find(name))

    def resolve_ref(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """The same for a reference that is trusted, such as one that this catalog gave out."""
        ref = self.rooted(ref)
        resolved = self.sources.of(ref).resolve(name, ref)
        with self._lock:
            self._known[ref] = resolved.digest
            self._known.move_to_end(ref)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return resolved

    def recall(self, name: str, ref: AdapterRef) -> ResolvedAdapter | None:
        """What ``resolve_ref`` would answer from memory, None when it would have to look. Never blocks.

        Raises what is remembered of a failure.
        """
        return self.sources.of(ref).recall(name, self.rooted(ref))

    def known_digest(self, ref: AdapterRef) -> str | None:
        """What ``ref`` meant when it was last resolved here; None when it was not. Asks nobody."""
        ref = self.rooted(ref)
        with self._lock:
            known = self._known.get(ref)
        if known is not None or ref.source != "merge":
            return known
        merge = Merge.of(ref)  # of whose parts each may have been looked up by itself
        return merge.digest_of([None if part.ref is None else self.known_digest(part.ref) for part in merge.parts])

    def forget(self, ref: AdapterRef) -> None:
        """Have the next ``resolve`` of this reference ask its source, whatever was remembered."""
        self.sources.forget(self.rooted(ref))

    def fetch(
        self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """The files of ``resolved``, brought here if need be; see ``AdapterSource.fetch``."""
        return self.sources.of(resolved.ref).fetch(resolved, max_weights_bytes, meanwhile)

    def at_hand(self, ref: AdapterRef, digest: str | None) -> bool:
        """Whether ``fetch`` of this content needs no network."""
        return self.sources.of(ref).at_hand(self.rooted(ref), digest)

    def close(self) -> None:
        """Close the sources."""
        self.sources.close()

    def rooted(self, ref: AdapterRef) -> AdapterRef:
        """The reference with a local path made absolute, as the settings' other paths are."""
        return self._names.rooted(ref)

"""Adapters by name or digest, packed and ready for a slot: catalog, sources and host cache behind one door."""

from __future__ import annotations

from dataclasses import replace

import torch

from adapter_store.catalog import Catalog
from adapter_store.checkpoint import max_weights_bytes, pack_files
from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused
from adapter_store.failures import RecentFailures
from adapter_store.host_cache import HostCache
from adapter_store.layout import AdapterLayout
from adapter_store.load_stats import LoadMeter, StoreStats
from adapter_store.packed import PackedAdapter
from adapter_store.settings import StoreSettings
from adapter_store.single_flight import SingleFlight
from adapter_store.source import AdapterRef, ResolvedAdapter


class AdapterStore:
    """Loads adapters of one base model. Thread-safe; every method may block on disk or network."""

    def __init__(
        self,
        settings: StoreSettings,
        layout: AdapterLayout,
        dtype: torch.dtype,
        max_rank: int,
        *,
        pin_memory: bool = False,
    ) -> None:
        """max_rank: the largest slot class. pin_memory: set where slots are on a GPU.

        Raises ValueError when the settings name a folder that does not exist.
        """
        self.catalog = Catalog(settings)
        self.host_cache = HostCache(settings.host_cache_bytes)
        self._layout = layout
        self._dtype = dtype
        self._max_rank = max_rank
        self._pin_memory = pin_memory
        self._flights: SingleFlight[PackedAdapter] = SingleFlight()
        self._failures = RecentFailures(settings.negative_ttl_s)
        self._packed = LoadMeter()

    def resolve(self, name: str) -> ResolvedAdapter:
        """What a client's name means now; see ``Catalog.resolve``."""
        return self.catalog.resolve(name)

    def load(self, adapter: str | AdapterRef | ResolvedAdapter, digest: str | None = None) -> PackedAdapter:
        """The adapter, packed. Concurrent calls for the same content share the work.

        adapter: a name as a client gives it, checked against the catalog; or an AdapterRef or ResolvedAdapter, which
        are trusted, as is a reference string that comes with a digest (only someone who resolved it knows that).
        digest: the content that is wanted; what is in the host cache is then found without asking any source.

        Raises AdapterNotFound, AdapterRefused, AdapterUnavailable, and AdapterChanged when the content found is not
        the one of ``digest``: resolve again.
        """
        if isinstance(adapter, ResolvedAdapter):
            digest = digest or adapter.digest
        if digest is not None:
            packed = self.host_cache.get(digest)
            if packed is not None:
                return packed
        resolved = self._resolve(adapter, digest)
        if digest is not None and resolved.digest != digest:
            raise AdapterChanged(
                resolved.name, f"its content is now {resolved.digest[:12]}, not the {digest[:12]} that was asked for"
            )
        if digest is None:
            packed = self.host_cache.get(resolved.digest)
            if packed is not None:
                return packed
        self._failures.check(resolved.digest, resolved.name)
        try:
            return self._flights.run(resolved.digest, lambda: self._load(resolved))
        except AdapterError as error:  # a follower shares the failure, not the other caller's name
            raise error.named(resolved.name) from None

    def at_hand(self, adapter: str, digest: str | None = None) -> bool:
        """Whether ``load`` of the same arguments needs no network: it is on this machine, or refused without asking."""
        try:
            ref = _trusted_ref(adapter, digest) or self.catalog.find(adapter)
        except AdapterNotFound:
            return True
        return self.catalog.at_hand(ref, digest)

    def stats(self) -> StoreStats:
        """What loading took so far, by tier, and what is remembered now. Any thread."""
        sources = self.catalog.sources.stats()
        sources = replace(
            sources,
            remembered_failures=sources.remembered_failures + len(self._failures),
            failures_repeated=sources.failures_repeated + self._failures.repeated,
        )
        return StoreStats(sources, self._packed.totals, self.host_cache.stats())

    def close(self) -> None:
        """Close the sources and drop the host cache."""
        self.catalog.close()
        self.host_cache.clear()

    def _resolve(self, adapter: str | AdapterRef | ResolvedAdapter, digest: str | None) -> ResolvedAdapter:
        if isinstance(adapter, ResolvedAdapter):
            return adapter
        ref = adapter if isinstance(adapter, AdapterRef) else _trusted_ref(adapter, digest)
        if ref is None:
            return self.catalog.resolve(str(adapter))
        if digest is not None and (ref.pinned or ref.source == "local"):
            # Resolved elsewhere: fetching verifies the digest, so nothing needs to be asked or hashed twice.
            return ResolvedAdapter(str(adapter), self.catalog.rooted(ref), digest)
        return self.catalog.resolve_ref(str(adapter), ref)

    def _load(self, resolved: ResolvedAdapter) -> PackedAdapter:
        try:
            files = self.catalog.fetch(resolved, max_weights_bytes(self._layout, self._max_rank))
            with self._packed.measure() as work:
                packed = pack_files(
                    files,
                    self._layout,
                    self._max_rank,
                    self._dtype,
                    resolved.name,
                    digest=resolved.digest,
                    pin_memory=self._pin_memory,
                )
                work.bytes = packed.nbytes
        except AdapterRefused as error:
            self._failures.add(resolved.digest, error)
            raise
        self.host_cache.put(packed)
        return packed


def _trusted_ref(adapter: str, digest: str | None) -> AdapterRef | None:
    """The reference that a string is, if it came with a digest: only someone who resolved it knows that."""
    if digest is None or not adapter.startswith(("hub:", "local:")):
        return None
    try:
        return AdapterRef.parse(adapter)
    except ValueError as error:
        raise AdapterNotFound(adapter, str(error)) from error

"""Adapters by name or digest, packed and ready for a slot: catalog, sources and host cache behind one door."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from adapter_store.catalog import Catalog
from adapter_store.checkpoint import max_weights_bytes, pack_files
from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.errors import AdapterChanged, AdapterError, AdapterNotFound, AdapterRefused
from adapter_store.eviction import EvictionPolicy
from adapter_store.failures import RecentFailures
from adapter_store.host_cache import ROOM_ALIGNMENT, Allocation, HostCache, HostMemoryFull, Room
from adapter_store.layout import AdapterLayout
from adapter_store.load_stats import LoadMeter, StoreStats
from adapter_store.merging import pack_merged
from adapter_store.packed import PackedAdapter
from adapter_store.references import owner_of, parse_reference
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
        eviction: EvictionPolicy | None = None,
    ) -> None:
        """max_rank: the largest slot class. pin_memory: set where slots are on a GPU. eviction: of the host cache.

        Raises ValueError when the settings name a folder that does not exist or hold no adapter in host memory, and
        RuntimeError when there is not so much of that.
        """
        self.catalog = Catalog(settings)
        check_host_cache(settings.host_cache_bytes, layout, dtype, max_rank)
        self.host_cache = HostCache(settings.host_cache_bytes, pin_memory=pin_memory, eviction=eviction)
        self._layout = layout
        self._dtype = dtype
        self._max_rank = max_rank
        self._flights: SingleFlight[None] = SingleFlight()
        self._failures = RecentFailures(settings.negative_ttl_s)
        self._packed = LoadMeter()

    def resolve(self, name: str) -> ResolvedAdapter:
        """What a client's name means now; see ``Catalog.resolve``."""
        return self.catalog.resolve(name)

    def load(
        self, adapter: str | AdapterRef | ResolvedAdapter, digest: str | None = None, room: Room | None = None
    ) -> PackedAdapter:
        """The adapter, packed, with a reference that the caller gives back with ``host_cache.release``.

        Concurrent calls for the same content share the work.

        adapter: a name as a client gives it, checked against the catalog; or an AdapterRef or ResolvedAdapter, which
        are trusted, as is a reference string that comes with a digest (only someone who resolved it knows that).
        digest: the content that is wanted; what is in the host cache is then found without asking any source.
        room: reserved in the host cache for it, and given back when it is not needed.

        Raises AdapterNotFound, AdapterRefused, AdapterUnavailable, HostMemoryFull, and AdapterChanged when the content
        found is not the one of ``digest``: resolve again.
        """
        with Allocation(self.host_cache, self._dtype, room) as allocation:
            return self._load(adapter, digest, allocation)

    def _load(
        self, adapter: str | AdapterRef | ResolvedAdapter, digest: str | None, allocation: Allocation
    ) -> PackedAdapter:
        if isinstance(adapter, ResolvedAdapter):
            digest = digest or adapter.digest
        packed = None if digest is None else self.host_cache.acquire(digest)
        if packed is not None:
            return packed
        resolved = self._resolve(adapter, digest)
        if digest is not None and resolved.digest != digest:
            raise AdapterChanged(
                resolved.name, f"its content is now {resolved.digest[:12]}, not the {digest[:12]} that was asked for"
            )
        packed = self.host_cache.acquire(resolved.digest)
        while packed is None:
            self._failures.check(resolved.digest, resolved.name)
            ours: list[PackedAdapter] = []
            try:
                self._flights.run(resolved.digest, lambda: ours.append(self._pack(resolved, allocation)))  # noqa: B023
            except AdapterError as error:  # a follower shares the failure, not the other caller's name
                raise error.named(resolved.name) from None
            packed = ours[0] if ours else self.host_cache.acquire(resolved.digest)  # None: evicted again meanwhile
        return packed

    def at_hand(self, adapter: str, digest: str | None = None) -> bool:
        """Whether ``load`` of the same arguments needs no network: it is on this machine, or refused without asking."""
        try:
            ref = _trusted_ref(adapter, digest) or self.catalog.find(adapter)
        except AdapterNotFound:
            return True
        return self.catalog.at_hand(ref, digest)

    def owner(self, adapter: str, digest: str | None = None) -> str:
        """Whose server ``load`` of the same arguments may wait for (see ``owner_of``). Raises AdapterNotFound."""
        return owner_of(_trusted_ref(adapter, digest) or self.catalog.find(adapter))

    def stats(self) -> StoreStats:
        """What loading took so far, by tier, and what is remembered now. Any thread."""
        sources = self.catalog.sources.stats()
        sources = replace(
            sources,
            remembered_failures=sources.remembered_failures + len(self._failures),
            failures_repeated=sources.failures_repeated + self._failures.repeated,
        )
        disk = self.catalog.sources.disk.stats()
        return StoreStats(sources, self._packed.totals, self.host_cache.stats(), disk)

    def close(self) -> None:
        """Close the sources and let go of host memory. No copy to a slot may be under way."""
        self.catalog.close()
        self.host_cache.close()

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

    def _pack(self, resolved: ResolvedAdapter, allocation: Allocation) -> PackedAdapter:
        started = time.monotonic()
        try:
            packed = (self._pack_merged if resolved.ref.source == "merge" else self._pack_one)(resolved, allocation)
        except AdapterRefused as error:
            self._failures.add(resolved.digest, error)
            raise
        return allocation.keep(replace(packed, load_seconds=time.monotonic() - started))

    def _pack_one(self, resolved: ResolvedAdapter, allocation: Allocation) -> PackedAdapter:
        packing = _Packing(lambda files: self._pack_files(files, resolved, allocation))
        files = self.catalog.fetch(resolved, max_weights_bytes(self._layout, self._max_rank), packing.begin)
        try:
            return packing.result(files)
        finally:
            files.discard()

    def _pack_merged(self, resolved: ResolvedAdapter, allocation: Allocation) -> PackedAdapter:
        with self._packed.measure() as work:
            packed = pack_merged(resolved, self.catalog.fetch, self._layout, self._max_rank, allocation.slab)
            work.bytes = packed.nbytes
        return packed

    def _pack_files(self, files: CheckpointFiles, resolved: ResolvedAdapter, allocation: Allocation) -> PackedAdapter:
        with self._packed.measure() as work:
            packed = pack_files(
                files, self._layout, self._max_rank, allocation.slab, resolved.name, digest=resolved.digest
            )
            work.bytes = packed.nbytes
        return packed


class _Packing:
    """Packs files while they are hashed: nobody sees what came of it unless they are the right ones."""

    def __init__(self, pack: Callable[[CheckpointFiles], PackedAdapter]) -> None:
        self._pack = pack
        self._files: CheckpointFiles | None = None
        self._made: PackedAdapter | AdapterRefused | HostMemoryFull | None = None

    def begin(self, files: CheckpointFiles) -> None:
        """Pack ``files``, of which nobody knows yet whether they are the right ones."""
        self._files = files
        try:
            self._made = self._pack(files)
        except (AdapterRefused, HostMemoryFull) as error:
            self._made = error

    def result(self, files: CheckpointFiles) -> PackedAdapter:
        """What came of packing ``files``. Raises AdapterRefused and HostMemoryFull."""
        if self._files is not files:
            self.begin(files)
        made, self._made, self._files = self._made, None, None
        assert made is not None
        if isinstance(made, PackedAdapter):
            return made
        try:
            raise made
        finally:
            del made  # else the error's frames hold the error, and with it the files and the slab


def check_host_cache(host_cache_bytes: int, layout: AdapterLayout, dtype: torch.dtype, max_rank: int) -> None:
    """Raises ValueError when an adapter of ``max_rank`` would not fit into a host cache of so many bytes."""
    least = layout.slab_elements(max_rank) * dtype.itemsize + ROOM_ALIGNMENT
    if host_cache_bytes < least:
        raise ValueError(
            f"store.host_cache_bytes is {host_cache_bytes} but one adapter of rank {max_rank} needs "
            f"{least} bytes of host memory on its way to a slot: raise it, or lower the ranks of slots"
        )


def _trusted_ref(adapter: str, digest: str | None) -> AdapterRef | None:
    """The reference that a string is, if it came with a digest: only someone who resolved it knows that."""
    if digest is None or not AdapterRef.is_meant(adapter):
        return None
    try:
        return parse_reference(adapter)
    except ValueError as error:
        raise AdapterNotFound(adapter, str(error)) from error

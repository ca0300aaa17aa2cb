"""The places that adapters come from, one object each."""

from __future__ import annotations

from adapter_store.disk_cache import DiskCache
from adapter_store.hub_client import HubClient
from adapter_store.load_stats import SourceStats
from adapter_store.local_source import LocalSource
from adapter_store.merging_source import MergingSource
from adapter_store.object_client import ObjectClient
from adapter_store.remote_source import RemoteSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, AdapterSource


class Sources:
    """Every source, found by reference. Thread-safe."""

    def __init__(self, settings: StoreSettings) -> None:
        self._local = LocalSource()
        self.disk = DiskCache(settings.path(settings.cache_dir) / "adapters", settings.cache_bytes)
        self._hub = RemoteSource(settings, HubClient(settings), self.disk)
        self._objects = RemoteSource(settings, ObjectClient(settings), self.disk)
        self._merging = MergingSource(self.of)

    def of(self, ref: AdapterRef) -> AdapterSource:
        """The source that keeps what ``ref`` names."""
        return {"local": self._local, "hub": self._hub, "merge": self._merging}.get(ref.source, self._objects)

    def stats(self) -> SourceStats:
        """What all of them did so far."""
        read = SourceStats(read=self.disk.reading.totals)
        return self._local.stats() + self._hub.stats() + self._objects.stats() + read

    def close(self) -> None:
        """Close all of them."""
        for source in (self._local, self._hub, self._objects):
            source.close()

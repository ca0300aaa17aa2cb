"""The places that adapters come from, one object each."""

from __future__ import annotations

from adapter_store.hub_source import HubSource
from adapter_store.load_stats import SourceStats
from adapter_store.local_source import LocalSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, AdapterSource


class Sources:
    """Every source, found by reference. Thread-safe."""

    def __init__(self, settings: StoreSettings) -> None:
        self._local = LocalSource()
        self._hub = HubSource(settings)

    def of(self, ref: AdapterRef) -> AdapterSource:
        """The source that keeps what ``ref`` names."""
        return self._local if ref.source == "local" else self._hub

    def stats(self) -> SourceStats:
        """What all of them did so far."""
        return self._local.stats() + self._hub.stats()

    def close(self) -> None:
        """Close all of them."""
        self._local.close()
        self._hub.close()

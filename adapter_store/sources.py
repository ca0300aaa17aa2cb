"""The places that adapters come from, one object each."""

from __future__ import annotations

from contextlib import AbstractContextManager

from adapter_store.chat_templates import ChatTemplates
from adapter_store.disk_cache import DiskCache
from adapter_store.hub_client import HubClient
from adapter_store.load_stats import SourceStats
from adapter_store.local_source import LocalSource
from adapter_store.merging_source import MergingSource
from adapter_store.object_client import ObjectClient
from adapter_store.remote_source import RemoteSource
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, AdapterSource, ResolvedAdapter
from adapter_store.template_files import Templates


class Sources:
    """Every source, found by reference. Thread-safe."""

    def __init__(self, settings: StoreSettings) -> None:
        self._local = LocalSource()
        self.disk = DiskCache(settings.path(settings.cache_dir) / "adapters", settings.cache_bytes)
        hub_client = HubClient(settings)
        self._hub_tokens = hub_client.tokens
        self._hub = RemoteSource(settings, hub_client, self.disk)
        self._objects = RemoteSource(settings, ObjectClient(settings), self.disk)
        self._merging = MergingSource(self.of)
        self.templates = ChatTemplates(self._read_templates, settings.negative_ttl_s)

    def of(self, ref: AdapterRef) -> AdapterSource:
        """The source that keeps what ``ref`` names."""
        return {"local": self._local, "hub": self._hub, "merge": self._merging}.get(ref.source, self._objects)

    def prove_on_hub(self, name: str, ref: AdapterRef, token: str) -> ResolvedAdapter:
        """What the Hub shows of ``ref`` now to who has ``token``, or to anybody where that is empty.

        Raises AdapterNotFound, AdapterRefused or AdapterUnavailable.
        """
        with self._hub_tokens.as_caller(token):
            return self._hub.prove(name, ref)

    def lend_token(self, ref: AdapterRef, token: str) -> AbstractContextManager[None]:
        """Meanwhile the content of ``ref`` is read with a caller's token, which its source showed it to."""
        return self._hub_tokens.lent(ref, token)

    def forget(self, ref: AdapterRef) -> None:
        """Have the next look at ``ref`` ask its source, whatever was remembered."""
        self.of(ref).forget(ref)
        self.templates.forget(ref)

    def stats(self) -> SourceStats:
        """What all of them did so far."""
        read = SourceStats(read=self.disk.reading.totals)
        return self._local.stats() + self._hub.stats() + self._objects.stats() + read

    def close(self) -> None:
        """Close all of them."""
        for source in (self._local, self._hub, self._objects):
            source.close()

    def _read_templates(self, resolved: ResolvedAdapter, token: str | None) -> Templates:
        source = self.of(resolved.ref)
        if token is None or resolved.ref.source != "hub":
            return source.templates(resolved)
        with self._hub_tokens.as_caller(token):
            return source.templates(resolved)

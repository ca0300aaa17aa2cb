"""Adapters in repositories of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from adapter_store.errors import AdapterUnavailable
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, ResolvedAdapter


class HubSource:
    """The Hub."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        raise AdapterUnavailable(name, "Hub access is not part of this build")

    def fetch(self, resolved: ResolvedAdapter) -> Path:
        raise AdapterUnavailable(resolved.name, "Hub access is not part of this build")

    def close(self) -> None:
        return

"""Everything about the adapter store that an operator may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapter_store.source import AdapterRef


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Which adapters there are, where they are kept, and the limits on fetching them.

    root: folder that relative paths below are resolved against.
    adapters: name -> reference (``local:relative/or/absolute`` or ``hub:org/name@rev``).
    folders: each sub-folder that holds an adapter_config.json is an adapter named after the sub-folder.
    allow: patterns (``hub:acme/*``) of references that clients may name directly; ``*`` crosses slashes.
    cache_dir: where downloads are kept between runs; cache_bytes: how much of them.
    host_cache_bytes: host memory for packed adapters; 0 keeps none.
    hub_endpoint: None is the public Hub. hub_token_env: environment variable that holds the access token.
    hub_timeout_s: how long the Hub may stay silent. hub_retries: further tries after a failure that may pass.
    hub_download_timeout_s: limit on fetching one file, tries included. hub_max_bytes: largest file fetched at all.
    hub_refresh_s: how long a branch or tag is taken to still mean the same commit.
    negative_ttl_s: how long a refusal or a missing adapter is remembered.
    """

    root: Path = field(default_factory=Path.cwd)
    adapters: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    cache_dir: str = "~/.cache/lorafleet"
    cache_bytes: int = 64 << 30
    host_cache_bytes: int = 4 << 30
    hub_endpoint: str | None = None
    hub_token_env: str = "HF_TOKEN"  # noqa: S105 - the variable's name
    hub_timeout_s: float = 10.0
    hub_retries: int = 3
    hub_download_timeout_s: float = 300.0
    hub_max_bytes: int = 4 << 30
    hub_refresh_s: float = 60.0
    negative_ttl_s: float = 5.0

    def __post_init__(self) -> None:
        for name, ref in self.adapters.items():
            if not name:
                raise ValueError(f"adapters: the name for {ref!r} is empty")
            try:
                AdapterRef.parse(ref)
            except ValueError as error:
                raise ValueError(f"adapters[{name!r}]: {error}") from error
        for pattern in self.allow:
            if not pattern.startswith(("hub:", "local:/")):
                raise ValueError(f"allow: {pattern!r} must start with 'hub:' or 'local:/', for example 'hub:acme/*'")
        if self.hub_endpoint is not None and not self.hub_endpoint.startswith(("https://", "http://")):
            raise ValueError(f"hub_endpoint is {self.hub_endpoint!r} but must be a URL such as https://huggingface.co")
        limits = (
            ("host_cache_bytes", self.host_cache_bytes >= 0, "0 or more"),
            ("cache_bytes", self.cache_bytes >= 0, "0 or more"),
            ("hub_download_timeout_s", self.hub_download_timeout_s > 0, "above 0"),
            ("hub_max_bytes", self.hub_max_bytes > 0, "above 0"),
            ("hub_timeout_s", self.hub_timeout_s > 0, "above 0"),
            ("hub_retries", 0 <= self.hub_retries <= 10, "between 0 and 10"),
            ("hub_refresh_s", self.hub_refresh_s >= 0, "0 or more"),
            ("negative_ttl_s", 0 <= self.negative_ttl_s <= 60, "between 0 and 60"),
        )
        for name, ok, allowed in limits:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be {allowed}")

    def path(self, text: str) -> Path:
        """A path from these settings, absolute: ``~`` expanded, relative ones taken from ``root``."""
        return Path(self.root, Path(text).expanduser()).absolute()

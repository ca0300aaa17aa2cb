"""Everything about the adapter store that an operator may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.merging_recipe import MOST_PARTS
from adapter_store.references import parse_reference
from adapter_store.source import AdapterRef
from adapter_store.source_settings import Limits, SourceSettings

_UNSAID = SourceSettings()


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Which adapters there are, where they are kept, and the limits on fetching them.

    root: folder that relative paths below are resolved against.
    adapters: name -> reference (``local:relative/or/absolute``, ``hub:org/name@rev``, ``s3://bucket/prefix``).
    folders: each sub-folder that holds an adapter_config.json is an adapter named after the sub-folder.
    allow: patterns (``hub:acme/*``, ``s3://acme/*``) of references that clients may name directly; ``*`` crosses
    slashes.
    cache_dir: where downloads are kept between runs; cache_bytes: how much of them.
    merge_parts: most adapters that a client may have merged into one; 0 for no merges but those in ``adapters``.
    host_cache_bytes: host memory for packed adapters; an engine needs room for one of its largest slots.
    hub_endpoint: None is the public Hub. hub_token_env: environment variable that holds the access token.
    sources: the beginning of references (``s3://acme-adapters``, ``hub:acme``) -> how that source is reached; of
    several that fit, the longest counts. Where one says nothing, the Hub's limits hold:
    hub_timeout_s: how long a server may stay silent. hub_retries: further tries after a failure that may pass.
    hub_download_timeout_s: limit on fetching one adapter, tries included. hub_max_bytes: largest file fetched at all.
    hub_refresh_s: how long a server's last word on a reference counts, also on whether it may be read.
    negative_ttl_s: how long a failure (refused, missing, unavailable) is remembered and answered at once.
    """

    root: Path = field(default_factory=Path.cwd)
    adapters: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    merge_parts: int = 8
    cache_dir: str = "~/.cache/lorafleet"
    cache_bytes: int = 64 << 30
    host_cache_bytes: int = 4 << 30
    sources: Mapping[str, SourceSettings] = field(default_factory=dict)
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
                parse_reference(ref)
            except ValueError as error:
                raise ValueError(f"adapters[{name!r}]: {error}") from error
        for pattern in self.allow:
            if not pattern.startswith(("hub:", "local:/")) and not AdapterRef.is_url(pattern):
                raise ValueError(
                    f"allow: {pattern!r} must start with 'hub:', 'local:/' or a scheme such as 's3://', for example "
                    "'hub:acme/*'"
                )
        object.__setattr__(self, "sources", {key: _source(key, value) for key, value in self.sources.items()})
        if self.hub_endpoint is not None and not self.hub_endpoint.startswith(("https://", "http://")):
            raise ValueError(f"hub_endpoint is {self.hub_endpoint!r} but must be a URL such as https://huggingface.co")
        limits = (
            ("host_cache_bytes", self.host_cache_bytes >= 0, "0 or more"),
            ("merge_parts", 0 <= self.merge_parts <= MOST_PARTS, f"between 0 and {MOST_PARTS}"),
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

    def source_key(self, ref: AdapterRef) -> str:
        """The key of ``sources`` that counts for ``ref``; empty when none does."""
        text = str(ref.unpinned)
        return max((key for key in self.sources if _begins(text, key)), key=len, default="")

    def source(self, ref: AdapterRef) -> SourceSettings:
        """How the source of ``ref`` is reached."""
        return self.sources.get(self.source_key(ref), _UNSAID)

    def limits(self, ref: AdapterRef) -> Limits:
        """The limits on exchanges about ``ref``."""
        source = self.source(ref)

        def first(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        return Limits(
            first(source.timeout_s, self.hub_timeout_s),
            first(source.retries, self.hub_retries),
            first(source.download_timeout_s, self.hub_download_timeout_s),
            first(source.max_bytes, self.hub_max_bytes),
            first(source.refresh_s, self.hub_refresh_s),
        )

    def token_variable(self, ref: AdapterRef) -> str:
        """The environment variable that holds the Hub's token for ``ref``."""
        return self.source(ref).env.get("token", self.hub_token_env)


def _begins(text: str, key: str) -> bool:
    """Whether a reference begins with a source's key; ``s3://acme`` is not the beginning of ``s3://acme-evil/x``."""
    stem = key.rstrip("/")
    return text == stem or text.startswith(stem if stem.endswith(":") else stem + "/")


def _source(key: str, value: SourceSettings | Mapping[str, Any]) -> SourceSettings:
    try:
        source = SourceSettings.of(value)
    except ValueError as error:
        raise ValueError(f"sources[{key!r}]: {error}") from None
    if key.startswith("hub:"):
        if source.options or not source.env.keys() <= {"token"}:
            raise ValueError(f"sources[{key!r}]: of the Hub only env: {{token: VARIABLE}} and limits can be set")
    elif not AdapterRef.is_url(key):
        raise ValueError(f"sources: {key!r} must be the beginning of references: 's3://bucket' or 'hub:org'")
    return source

"""The keys file: which keys there are, whose they are, and what those may do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from adapter_store.source import AdapterRef
from deployments.config_file import repeated_keys
from deployments.mistakes import told
from deployments.tenants.caller import Caller
from deployments.tenants.keys import PREFIX, is_key_hash, key_hash
from deployments.tenants.tenant import Limits, Tenant

# No colon and no slash: references and adapters' names have them, and those stand for tenants where there are no keys.
_NAME = re.compile(r"[A-Za-z0-9_][\w.@-]{0,127}", re.ASCII)


def _hash(text: str) -> str:
    if not is_key_hash(text):  # without the text: it may be a key
        raise ValueError(
            "a key is given as its hash, sha256: and 64 hex digits; python -m deployments.tenants new-key prints both"
        )
    return text


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("a tenant's name has letters, digits and any of _ . @ - , at most 128")
    return text


def _pattern(text: str) -> str:
    if AdapterRef.is_meant(text) and not text.startswith(("hub:", "local:/")) and not AdapterRef.is_url(text):
        raise ValueError(f"{text!r} must start with 'hub:', 'local:/' or a scheme such as 's3://', or be a plain name")
    return text


_KEY = re.compile(re.escape(PREFIX) + r"[\w-]+")
KeyHash = Annotated[str, AfterValidator(_hash)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class TenantEntry(_Section):
    """What the file says of one tenant; see ``Tenant`` and ``Limits``."""

    keys: list[KeyHash]
    adapters: list[Annotated[str, AfterValidator(_pattern)]] = Field(default_factory=list)
    base_model: bool = True
    requests_per_minute: int | None = Field(default=None, ge=1, le=10_000_000)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    weight: float | None = Field(default=None, gt=0, le=1e6)
    server_credentials: bool = False

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name."""
        limits = Limits(self.requests_per_minute, self.tokens_per_minute, self.concurrency)
        return Tenant(name, tuple(self.adapters), self.base_model, limits, self.weight, self.server_credentials)


class KeysFile(_Section):
    """The whole file. admin: hashes of keys that administer adapters and may use everything."""

    admin: list[KeyHash] = Field(default_factory=list)
    tenants: dict[Annotated[str, AfterValidator(_name)], TenantEntry] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Keys and tenants, as one file says them. Immutable: a request sees the old file or the new one."""

    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    _by_hash: Mapping[str, Tenant | None] = field(default_factory=dict, repr=False)  # None: an admin key

    @classmethod
    def parse(cls, text: str) -> KeyTable:
        """Read YAML or JSON. Raises ValueError that says where the mistake is and quotes nothing of the file."""
        try:
            repeated = next(iter(repeated_keys(text)), None)
            written = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f" in line {mark.line + 1}"
            raise ValueError(f"it is no YAML{where}") from None
        if repeated is not None:
            raise ValueError(_without_keys(repeated))
        try:
            file = KeysFile.model_validate({} if written is None else written)
        except ValidationError as error:
            raise ValueError(_without_keys("; ".join(told(error, "", KeysFile)))) from None
        tenants = {name: entry.tenant(name) for name, entry in file.tenants.items()}
        by_hash: dict[str, Tenant | None] = {}
        owners = [("admin", None, file.admin)]
        owners += [(f"tenants.{name}", tenants[name], entry.keys) for name, entry in file.tenants.items()]
        for place, tenant, hashes in owners:
            for one in hashes:
                if one in by_hash:
                    raise ValueError(f"{place}: a key that stands in the file before: each key is one's alone")
                by_hash[one] = tenant
        return cls(tenants, by_hash)

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; None for a key that there is not.

        What is compared is a hash of what the client sent: how long that takes says nothing of a key's beginning, as
        nobody can choose what the hash begins with.
        """
        digest = key_hash(key)
        if digest not in self._by_hash:
            return None
        tenant = self._by_hash[digest]
        return Caller(role="admin") if tenant is None else Caller(tenant, "tenant")


def _without_keys(message: str) -> str:
    """A message for logs: a key may stand where a name should."""
    return _KEY.sub(f"{PREFIX}...", message)

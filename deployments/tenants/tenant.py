"""One tenant: what it may name and how much it may use."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapter_store.merging_recipe import Merge
from adapter_store.source import AdapterRef


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None is no limit.

    requests_per_minute: requests let in within any 60 seconds. tokens_per_minute: tokens of requests let in within any
    60 seconds, prompts and completions. concurrency: requests that run at once.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def __bool__(self) -> bool:
        return (self.requests_per_minute, self.tokens_per_minute, self.concurrency) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose request it is.

    name: empty for nobody in particular. adapters: patterns (``*``, ``?``, ``[...]``) of names, and of references where
    a pattern begins like one (``hub:acme/*``); None is everything there is. base_model: whether it may use that.
    limits: how much it may use. weight: its share of the engine beside other tenants; None leaves it as
    ``engine.tenant_weights`` says. server_credentials: whether a reference that it names is read with this server's own
    credentials, instead of with those that come with the request.
    """

    name: str = ""
    adapters: tuple[str, ...] | None = None
    base_model: bool = True
    limits: Limits = Limits()
    weight: float | None = None
    server_credentials: bool = True

    def permits(self, model: str) -> bool:
        """Whether it may use the adapter that it calls ``model``, by the text alone: no file, no source is touched.

        A reference to a folder is to be judged again by where it really is, with ``permits_found``.
        """
        if self.adapters is None:
            return True
        try:
            if Merge.is_meant(model):
                parts = Merge.parse(model).parts
                return all(self.permits(one.name if one.ref is None else str(one.ref)) for one in parts)
            if AdapterRef.is_meant(model):
                return self._permits_reference(AdapterRef.parse(model))
        except ValueError:
            return False
        return any(fnmatchcase(model, one) for one in self.adapters if not AdapterRef.is_meant(one))

    def permits_found(self, model: str, found: AdapterRef) -> bool:
        """Whether it may use what the reference ``model``, which it ``permits``, was found to mean."""
        if self.adapters is None:
            return True
        if Merge.is_meant(model):  # parts that were named by a plain name mean what the operator says
            pairs = zip(Merge.parse(model).parts, Merge.of(found).parts, strict=True)
            return all(one.ref is None or (at.ref is not None and self._permits_reference(at.ref)) for one, at in pairs)
        return self._permits_reference(found)

    def _permits_reference(self, ref: AdapterRef) -> bool:
        """A pattern may say a revision or leave it out."""
        if ref.source == "local":
            ref = AdapterRef("local", posixpath.normpath(ref.id))
        patterns = [one for one in self.adapters or () if AdapterRef.is_meant(one)]
        bare, full = str(ref.unpinned), str(ref)
        return any(fnmatchcase(bare, one) or fnmatchcase(full, one) for one in patterns)

"""A gateway's look-up of adapters: the catalog, what was declared at run time, and the threads that may wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from itertools import islice
from typing import Any, Protocol, TypeVar

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterError, AdapterNotFound, AdapterUnavailable
from adapter_store.fair_threads import FairThreads
from adapter_store.merging_recipe import Merge, MergePart
from adapter_store.names import AdapterNames, NamedAdapter
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef, ResolvedAdapter
from adapter_store.template_files import Templates
from deployments.adapters.declarations import Declaration, Declarations
from deployments.tenants.caller import Caller
from deployments.tenants.source_proofs import SourceProofs

T = TypeVar("T")

# Sources (a Hub organisation, a bucket) that may be silent at once before a look-up at another one has to wait.
_SOURCES_AT_ONCE = 4
# Characters of a name that is compared with others, and how many others.
_MAX_SLIP = 64
_MAX_COMPARED = 500
# The one thing that a tenant is told of what is not there and of what is not its own.
_NOT_YOURS = "there is none that you may use under this name"


class Feed(Protocol):
    """What the directory needs of a ``DeclarationFeed``."""

    known: Declarations

    @property
    def heard(self) -> bool:
        """Whether what was declared before this process began is known."""
        ...

    async def wait_heard(self) -> bool:
        """Wait a while for that."""
        ...

    async def declare(self, name: str, **changes: Any) -> Declaration:
        """Change the word on a name, everywhere."""
        ...


class AdapterDirectory:
    """Names to content for one gateway. Everything that may block runs in threads: sources that are on a network in
    one pool, text and local look-ups in another, so that a slow source holds up nobody else.
    """

    def __init__(self, base_model: str, catalog: Catalog, threads: int = 8, *, declares: bool = False) -> None:
        """declares: whether adapters can be declared over HTTP, for what is said of a name that there is not.

        Raises ValueError when an adapter has the base model's name.
        """
        check_names(base_model, catalog.names())
        self.base_model = base_model
        self.catalog = catalog
        self.feed: Feed | None = None
        self._declares = declares
        self._text_pool = ThreadPoolExecutor(threads, "text")
        self._network_threads = FairThreads(_SOURCES_AT_ONCE * threads, threads, "sources")
        self._proofs = SourceProofs(self._prove, self.content)

    def reconfigure(self, settings: StoreSettings) -> None:
        """Take over the names of these settings. Raises ValueError for a mistake; nothing has changed then."""
        check_names(self.base_model, AdapterNames(settings).names())
        self.catalog.reconfigure(settings)

    async def hear(self, news: list[Declaration]) -> None:
        """Put new declarations into force."""
        assert self.feed is not None
        for one in news:
            if one.refreshes and (found := await self.in_text_pool(self._named_or_none, one.name)) is not None:
                self.catalog.forget(found.ref)
        self.catalog.declare(self.feed.known.references())

    async def names(self) -> list[str]:
        """Every adapter that has a name, sorted."""
        return await self.in_text_pool(self.catalog.names)

    async def named(self, name: str) -> NamedAdapter:
        """What the name stands for. Raises AdapterNotFound, and AdapterUnavailable while that cannot be known yet."""
        heard = self.feed is None or self.feed.heard  # before the look: it may be heard of meanwhile
        try:
            return await self.in_text_pool(self._named, name)
        except AdapterNotFound:
            if heard:
                raise
        assert self.feed is not None
        if not await self.feed.wait_heard():
            raise AdapterUnavailable(name, "what was declared at run time is not known here yet: try again in a moment")
        return await self.in_text_pool(self._named, name)

    async def names_for(self, caller: Caller) -> list[str]:
        """Those that the caller may use."""
        return [name for name in await self.names() if caller.tenant.permits(name)]

    async def resolve(self, model: str, caller: Caller, gone: str | None = None) -> ResolvedAdapter | None:
        """The content that a client's name means now; None for the base model. Raises what ``Catalog.resolve`` does.

        This is where it is decided, for every request, whether its sender may use what it names. What a tenant may not
        use is not looked for, so that it takes as long and answers the same whether it is there or not; and what it
        may use and is not there answers as that does.

        gone: digest of content that its source no longer has; who still takes the name for that asks anew.
        """
        if caller.role == "tenant":
            return await self._resolve_permitted(model, caller, gone)
        if model == self.base_model:
            return None
        named = await self.named(model)
        if named.origin == "reference" and caller.api_token is not None:
            return await self._proofs.resolve(named, caller, gone)
        return await self._own_content(named, gone)

    async def _resolve_permitted(self, model: str, caller: Caller, gone: str | None) -> ResolvedAdapter | None:
        tenant = caller.tenant
        if model == self.base_model and tenant.base_model:
            return None
        try:
            if model == self.base_model or not tenant.permits(model):
                raise AdapterNotFound(model, _NOT_YOURS)
            named = await self.named(model)
            if named.origin != "reference":
                return await self._own_content(named, gone)
            if not tenant.permits_found(model, named.ref):  # its text is, but not where it leads
                raise AdapterNotFound(model, _NOT_YOURS)
            if caller.api_token is None and tenant.server_credentials:
                return await self._own_content(named, gone)
            return await self._proofs.resolve(named, caller, gone)
        except AdapterNotFound:
            raise AdapterNotFound(model, _NOT_YOURS) from None

    async def _own_content(self, named: NamedAdapter, gone: str | None) -> ResolvedAdapter:
        """What this server itself finds."""
        if gone is not None:
            recalled = self.catalog.recall(named.name, named.ref)
            if (recalled is None and named.ref.source == "merge") or (recalled and recalled.digest == gone):
                self.catalog.forget(named.ref)
        return await self.content(named)

    async def content(self, named: NamedAdapter) -> ResolvedAdapter:
        """The content of what a name stands for."""
        if named.ref.source == "merge":  # so that one part's silent source holds up no look-ups at another's
            merge = Merge.of(named.ref)
            return merge.resolved(named.name, await asyncio.gather(*(self._part(named, one) for one in merge.parts)))
        if named.ref.source == "local":
            return await self.in_text_pool(self.catalog.resolve_ref, named.name, named.ref)
        recalled = self.catalog.recall(named.name, named.ref)
        if recalled is not None:  # what is known is not queued behind a source that does not answer
            return recalled
        owner, look_up = named.ref.owner, self.catalog.resolve_ref
        return await asyncio.wrap_future(self._network_threads.submit(owner, look_up, named.name, named.ref))

    async def templates(self, adapter: ResolvedAdapter, caller: Caller) -> Templates:
        """The chat templates that an adapter ships, which ``resolve`` found for this caller; empty where it ships none.

        Raises AdapterRefused for what cannot be read, AdapterNotFound or AdapterUnavailable.
        """
        shipped = self.catalog.sources.templates
        known = shipped.recall(adapter)
        if known is not None:
            return known
        if adapter.ref.source == "local":
            return await self.in_text_pool(shipped.get, adapter)
        token = caller.token_for(adapter.name)
        return await asyncio.wrap_future(self._network_threads.submit(adapter.ref.owner, shipped.get, adapter, token))

    async def _part(self, whole: NamedAdapter, part: MergePart) -> ResolvedAdapter:
        assert part.ref is not None
        try:
            return await self.content(NamedAdapter(part.name, part.ref, whole.origin))
        except AdapterError as error:
            raise part.error(whole.name, error) from error

    async def _prove(self, named: NamedAdapter, token: str) -> ResolvedAdapter:
        prove = self.catalog.sources.prove_on_hub
        return await asyncio.wrap_future(
            self._network_threads.submit(named.ref.owner, prove, named.name, named.ref, token)
        )

    async def in_text_pool(self, function: Callable[..., T], *args: Any) -> T:
        """Run what takes processor time or looks at local files."""
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, function, *args)

    def close(self) -> None:
        """Give threads and connections back."""
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        self._network_threads.close()
        self.catalog.close()

    def _named(self, name: str) -> NamedAdapter:
        try:
            return self.catalog.named(name)
        except AdapterNotFound as error:
            if AdapterRef.is_meant(name):
                raise
            near = near_miss(name, [self.base_model, *self.catalog.names()])
            hint = f"did you mean {near!r}? " if near is not None else ""
            remedy = ", or declare it with POST /v1/adapters" if self._declares else ""
            raise AdapterNotFound(name, f"{hint}{error.reason}{remedy}") from None

    def _named_or_none(self, name: str) -> NamedAdapter | None:
        try:
            return self.catalog.named(name)
        except AdapterNotFound:
            return None


def near_miss(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that ``name`` may be a slip of. Bounded: clients make up names as they like."""
    if len(name) > _MAX_SLIP:
        return None
    alike = (one for one in names if abs(len(one) - len(name)) <= 2)
    return next(iter(get_close_matches(name, islice(alike, _MAX_COMPARED), 1, 0.7)), None)


def check_names(base_model: str, names: Iterable[str]) -> None:
    """Raises ValueError when an adapter has the base model's name."""
    if base_model in names:
        raise ValueError(f"an adapter is named {base_model!r} like the base model: set model_name or rename it")

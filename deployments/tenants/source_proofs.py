"""That a caller may read what it names, shown by its source with the caller's own token, again and again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

from adapter_store.errors import AdapterNotFound
from adapter_store.merging_recipe import Merge, MergePart
from adapter_store.names import NamedAdapter
from adapter_store.source import ResolvedAdapter
from deployments.tenants.caller import Caller

PROOF_SECONDS = 10.0  # how long a source's word counts, so how long access goes on after it was taken away
MAX_PROOFS = 16_384  # a few hundred bytes each

# Tenant, source, id, revision, and a hash of the token: whoever has another token, or none, proves it anew.
_Key = tuple[str, str, str, str | None, bytes]


class SourceProofs:
    """What sources showed to callers with their own tokens. Only success is kept, and only for its tenant; while a
    source cannot be asked nothing is proven."""

    def __init__(
        self,
        prove: Callable[[NamedAdapter, str], Awaitable[ResolvedAdapter]],
        find: Callable[[NamedAdapter], Awaitable[ResolvedAdapter]],
    ) -> None:
        """prove: what a source shows to who has this token, empty for nobody in particular. find: what this server
        itself finds."""
        self._prove = prove
        self._find = find
        self._known: OrderedDict[_Key, tuple[float, ResolvedAdapter]] = OrderedDict()
        self._under_way: dict[_Key, asyncio.Task[ResolvedAdapter]] = {}

    async def resolve(self, named: NamedAdapter, caller: Caller, gone: str | None = None) -> ResolvedAdapter:
        """What a reference that the caller named means now. gone: digest of content that is no longer there.

        Raises AdapterNotFound where its source does not show it to the caller, AdapterRefused or AdapterUnavailable.
        """
        if named.ref.source != "merge":
            return await self._shown(named, caller, gone)
        merge = Merge.of(named.ref)
        return merge.resolved(named.name, await asyncio.gather(*(self._part(one, caller, gone) for one in merge.parts)))

    async def _part(self, part: MergePart, caller: Caller, gone: str | None) -> ResolvedAdapter:
        """What the caller names by reference is shown to it; what it names as the operator does is this server's."""
        assert part.ref is not None
        named = NamedAdapter(part.name, part.ref, "reference")
        return await (self._shown(named, caller, gone) if part.by_reference else self._find(named))

    async def _shown(self, named: NamedAdapter, caller: Caller, gone: str | None) -> ResolvedAdapter:
        ref = named.ref
        if ref.source == "local":
            return await self._find(named)  # of this machine; patterns alone say who may use it
        if ref.source != "hub":
            # What an object store shows, it shows to this server's credentials.
            if not caller.tenant.server_credentials:
                raise AdapterNotFound(named.name, "only this server itself may read it")
            return await self._find(named)
        token = caller.api_token or ""
        key = (caller.tenant.name, ref.source, ref.id, ref.revision, hashlib.sha256(token.encode()).digest())
        until, shown = self._known.get(key, (0.0, None))
        if shown is not None and until > time.monotonic() and shown.digest != gone:
            return shown
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.ensure_future(self._ask(key, named, token))
            task.add_done_callback(partial(self._done, key))
        return await asyncio.shield(task)

    async def _ask(self, key: _Key, named: NamedAdapter, token: str) -> ResolvedAdapter:
        self._known.pop(key, None)
        shown = await self._prove(named, token)
        self._known[key] = time.monotonic() + PROOF_SECONDS, shown
        while len(self._known) > MAX_PROOFS:
            self._known.popitem(last=False)
        return shown

    def _done(self, key: _Key, task: asyncio.Task[ResolvedAdapter]) -> None:
        self._under_way.pop(key, None)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone

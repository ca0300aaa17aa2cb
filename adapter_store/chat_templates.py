"""The chat templates that adapters ship, read when a chat needs them. Weights have nothing to do with them: they make
no part of the content digest, and replicas never see them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from adapter_store.errors import AdapterError
from adapter_store.failures import RecentFailures
from adapter_store.single_flight import SingleFlight
from adapter_store.source import AdapterRef, ResolvedAdapter, TemplateFile
from adapter_store.template_files import Templates

_MAX_BYTES = 32 << 20
_ENTRY_BYTES = 1 << 10  # what an entry takes beside its texts, roughly

_Key = tuple[AdapterRef, TemplateFile | None]


class ChatTemplates:
    """Texts by adapter and state of the file (``ResolvedAdapter.template``), those used last. Thread-safe; reads of the
    same are shared, and a failure is remembered for a moment, for who had the same token."""

    def __init__(self, read: Callable[[ResolvedAdapter, str | None], Templates], negative_ttl_s: float) -> None:
        """read: from the adapter's source, with a caller's token or this server's own."""
        self._read = read
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, Templates] = OrderedDict()
        self._bytes = 0
        self._reads: SingleFlight[Templates] = SingleFlight()
        self._failures = RecentFailures(negative_ttl_s)

    def recall(self, resolved: ResolvedAdapter) -> Templates | None:
        """What ``get`` would answer from memory; None when it would have to look. Never blocks."""
        if resolved.template is None:
            return {}
        with self._lock:
            known = self._known.get(_key(resolved))
            if known is not None:
                self._known.move_to_end(_key(resolved))
        return known

    def get(self, resolved: ResolvedAdapter, token: str | None = None) -> Templates:
        """The templates of an adapter that its caller may use; empty where it ships none.

        token: a caller's, with which its source is asked. Raises AdapterRefused for a file that is too large or
        broken, AdapterNotFound or AdapterUnavailable.
        """
        known = self.recall(resolved)
        if known is not None:
            return known
        asked = (_key(resolved), None if token is None else hashlib.sha256(token.encode()).digest())
        self._failures.check(asked, resolved.name)
        try:
            return self._reads.run(asked, lambda: self._remember(resolved, self._read(resolved, token)))
        except AdapterError as error:
            self._failures.add(asked, error)
            raise error.named(resolved.name) from None

    def forget(self, ref: AdapterRef) -> None:
        """Read what this reference ships again, also where nothing tells that it changed."""
        with self._lock:
            for key in [key for key in self._known if key[0] == ref]:
                self._bytes -= _size(self._known.pop(key))

    def _remember(self, resolved: ResolvedAdapter, templates: Templates) -> Templates:
        with self._lock:
            if _key(resolved) not in self._known:
                self._known[_key(resolved)] = templates
                self._bytes += _size(templates)
            while self._bytes > _MAX_BYTES:
                self._bytes -= _size(self._known.popitem(last=False)[1])
        return templates


def _key(resolved: ResolvedAdapter) -> _Key:
    return resolved.ref, resolved.template


def _size(templates: Templates) -> int:
    return _ENTRY_BYTES + sum(map(len, templates.values()))

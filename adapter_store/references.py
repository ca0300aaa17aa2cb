"""References of every kind, the merges among them, which are made of other references."""

from __future__ import annotations

from adapter_store.merging_recipe import Merge
from adapter_store.source import AdapterRef


def parse_reference(text: str) -> AdapterRef:
    """Read the string form of any reference. Raises what ``AdapterRef.parse`` and ``Merge`` raise."""
    return Merge.parse(text).ref if Merge.is_meant(text) else AdapterRef.parse(text)


def parts_of(ref: AdapterRef) -> tuple[AdapterRef, ...]:
    """Those that a merge is made of; else itself alone."""
    if ref.source != "merge":
        return (ref,)
    return tuple(part.ref for part in Merge.of(ref).parts if part.ref is not None)


def owner_of(ref: AdapterRef) -> str:
    """``AdapterRef.owner``; of a merge, that of the first part that is not ``local``."""
    return next((part.owner for part in parts_of(ref) if part.source != "local"), "local")

"""Names for the content of KV pages: equal only where adapter and every token up to the page's end are equal."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_SIZE = 16  # bytes: two pages of any cache meet in one key with a chance below 2**-64


def extend_keys(keys: list[bytes], digest: str | None, tokens: Sequence[int], pages: int, page_size: int) -> None:
    """Grow ``keys`` in place to those of the first ``pages`` pages of ``tokens`` under an adapter (None: the base).

    A page's key is the hash of the key before it and its own tokens; the first follows from the adapter's content
    digest. So no tenant's page is ever taken for that of another adapter, whatever its text.
    """
    for page in range(len(keys), pages):
        before = keys[-1] if keys else blake2b((digest or "").encode(), digest_size=_SIZE).digest()
        own = array("q", tokens[page * page_size : (page + 1) * page_size])
        keys.append(blake2b(before + own.tobytes(), digest_size=_SIZE).digest())

"""How news and placement name an adapter."""

from __future__ import annotations

KEY_LENGTH = 16  # hex digits: 64 bits of a digest are plenty for a hint and a quarter of the bytes on the wire


def short_key(digest: str) -> str:
    """The part of an adapter's digest that news carry. A hint: never used to serve weights."""
    return digest[:KEY_LENGTH]

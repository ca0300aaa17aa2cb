"""API keys: made at random, known by their hashes."""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "lf-"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def key_hash(key: str) -> str:
    """What is kept of a key: ``sha256:`` and 64 hex digits.

    A slow hash with a salt makes guessing dear where people choose the secret. There is nothing to guess in 256 random
    bits: trying all of them is out of reach for any hash, and equal keys do not occur.
    """
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def is_key_hash(text: str) -> bool:
    """Whether this is what ``key_hash`` gives."""
    return _HASH.fullmatch(text) is not None

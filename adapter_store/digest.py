"""The two files of an adapter and the identity of their content."""

from __future__ import annotations

import hashlib

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def content_digest(config_blob: str, weights_sha256: str) -> str:
    """The identity of an adapter's content, as 64 hex digits.

    config_blob: git blob sha1 of adapter_config.json. weights_sha256: sha256 of adapter_model.safetensors. These two
    are what the Hub reports without a download, so a Hub repository and a local copy of it have the same digest.
    """
    text = f"{CONFIG_FILE} {config_blob}\n{WEIGHTS_FILE} {weights_sha256}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def git_blob_sha1(data: bytes) -> str:
    """The object id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

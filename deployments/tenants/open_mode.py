"""Without keys anyone who reaches the server may use it, so without a word it must be reached from its machine only."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, is this machine's own, as machines elsewhere cannot reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_mistake(host: str | None, keys_file: str | None, *, stated: bool) -> str | None:
    """What is wrong with listening on ``host`` so. host: None listens nowhere. stated: ``gateway.open``."""
    if keys_file is not None or stated or host is None or is_loopback(host):
        return None
    return (
        f"http_options.host is {host!r}, so other machines reach this server, and it asks nobody for a key: set "
        "gateway.keys_file to the file that holds the keys, or http_options.host to 127.0.0.1, or, where something "
        "else decides who gets here, gateway.open to true"
    )

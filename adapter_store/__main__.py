"""``python -m adapter_store``: adapters looked at, packed, listed and fetched. See ``deployments.adapters.command``.

Alone of this package it stands above all the others: what it says must be what a server with the same settings does.
"""

from __future__ import annotations

from deployments.adapters.command import main

if __name__ == "__main__":
    main()

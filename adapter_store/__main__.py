"""``python -m adapter_store``: adapters looked at, packed, listed and fetched.

The command itself is ``deployments.adapters.command``, above all packages, as what it says must be what a server with
the same settings does; this package knows nothing of it.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("deployments.adapters.command", run_name="__main__")

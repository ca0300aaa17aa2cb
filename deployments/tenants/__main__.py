"""Make a key for the keys file (``gateway.keys_file``).

    python -m deployments.tenants new-key acme     a key of the tenant acme
    python -m deployments.tenants new-key --admin  a key that administers adapters
    python -m deployments.tenants check keys.yaml  what is wrong with a keys file

The key is printed this once and kept nowhere: only its hash goes into the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deployments.tenants.key_table import KeyTable
from deployments.tenants.keys import key_hash, new_key
from deployments.tenants.live_keys import LiveKeys


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.tenants", description="API keys for tenants.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("new-key", help="print a new key, and the line to put into the keys file")
    whose = make.add_mutually_exclusive_group(required=True)
    whose.add_argument("tenant", nargs="?", help="whose key it is to be")
    whose.add_argument("--admin", action="store_true", help="a key that administers adapters and may use everything")
    check = commands.add_parser("check", help="say what is wrong with a keys file")
    check.add_argument("file", type=Path)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "check":
            print(f"{asked.file}: {len(LiveKeys(asked.file).table.tenants)} tenants")
        else:
            _print_new(asked.tenant)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _print_new(tenant: str | None) -> None:
    key = new_key()
    line = f'"{key_hash(key)}"'
    text = f"admin: [{line}]\n" if tenant is None else f"tenants:\n  {tenant}:\n    keys: [{line}]\n"
    KeyTable.parse(text)  # raises for a name that could be nobody's
    print(f"key, shown this once: {key}\nin the keys file:\n\n{text}", end="")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

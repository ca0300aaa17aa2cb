"""The command line of adapters: what a server would make of them, before it is asked to."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapter_store.errors import AdapterError
from deployments.adapters.workbench import Adapter, Workbench
from deployments.settings_file import DEFAULT_CONFIG, read_settings, stop

_FETCHES = 4

DESCRIPTION = """\
Look at adapters as a server with the same settings would.

  python -m adapter_store check ./my-adapter              what would be refused, and why
  python -m adapter_store check shout hub:acme/legal@v3   by name, or by reference
  python -m adapter_store pack ./checkpoint-900 ./upload  only what is served, in the type it is served in
  python -m adapter_store list                            every name, and what stands behind it
  python -m adapter_store prefetch                        bring all of them to this machine's disk cache

An adapter is a folder, a reference such as hub:org/name@revision or s3://bucket/prefix, or a name of the settings.
The settings are those of the first application of --config; --model takes another base model, of which config.json
is enough. Exits with 1 when an adapter would not be served, and with 2 when the settings hold a mistake.
"""


def check(bench: Workbench, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Pack each as a replica would, and say what came of it."""
    for name in wanted:
        yield _about(name, lambda name=name: bench.packed(name))


def pack(bench: Workbench, wanted: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Check one, and write what is served of it to a new folder."""
    yield _about(wanted, lambda: bench.write(wanted, folder)) | {"folder": str(folder)}


def listed(bench: Workbench) -> Iterator[dict[str, Any]]:
    """Every adapter that has a name. Asks no network."""
    for named in bench.named():
        yield {"name": named.name, "reference": str(named.ref), "origin": named.origin} | bench.here(named)


def prefetch(bench: Workbench, wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Bring them to this machine, several at once."""
    with ThreadPoolExecutor(_FETCHES, thread_name_prefix="prefetch") as pool:
        yield from pool.map(lambda name: _about(name, lambda: bench.fetched(name)), wanted)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m adapter_store", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="Serve's configuration (serve_config.yaml)")
    parser.add_argument("--model", type=Path, help="folder of the base model, instead of the configuration's")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | pack | list | prefetch")
    one = commands.add_parser("check", help="what would be refused, and why")
    one.add_argument("adapters", nargs="+", metavar="ADAPTER")
    one = commands.add_parser("pack", help="write what is served of an adapter to a new folder")
    one.add_argument("adapter", metavar="ADAPTER")
    one.add_argument("folder", type=Path)
    commands.add_parser("list", help="every name, and what stands behind it")
    one = commands.add_parser("prefetch", help="bring adapters to this machine's disk cache")
    one.add_argument("adapters", nargs="*", metavar="ADAPTER", help="all that have a name when left out")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("adapter_store.progress").setLevel(logging.INFO)
    try:
        bench = Workbench(read_settings(parsed.config, parsed.model))
    except (OSError, ValueError) as error:
        stop(str(error))
    try:
        match parsed.command:
            case "check":
                found = check(bench, parsed.adapters)
            case "pack":
                found = pack(bench, parsed.adapter, parsed.folder)
            case "list":
                found = listed(bench)
            case _:
                found = prefetch(bench, parsed.adapters or [named.name for named in bench.named()])
        good = _show(found, as_json=parsed.json)
    finally:
        bench.close()
    sys.exit(0 if good else 1)


def _about(name: str, work: Callable[[], Adapter]) -> dict[str, Any]:
    try:
        adapter = work()
    except AdapterError as error:
        return {"name": name, "ok": False, "error": type(error).__name__, "reason": error.reason}
    except OSError as error:
        return {"name": name, "ok": False, "error": "OSError", "reason": f"{error.filename}: {error.strerror}"}
    return {"name": name, "ok": True} | adapter.told()


def _show(found: Iterable[dict[str, Any]], *, as_json: bool) -> bool:
    good = True
    for row in found:
        good &= row.get("ok", True)
        print(json.dumps(row) if as_json else _line(row), flush=True)
    return good


def _line(row: dict[str, Any]) -> str:
    said = {key: value for key, value in row.items() if key not in {"name", "ok", "error", "reason"}}
    if not row.get("ok", True):
        return f"{row['name']}: {row['error']}: {row['reason']}"
    return f"{row['name']}: " + ", ".join(f"{key} {_short(key, value)}" for key, value in said.items())


def _short(key: str, value: Any) -> str:
    if key == "digest" and value is not None:
        return str(value)[:12]
    if key.endswith("bytes") and value is not None:
        return f"{value / 2**20:.1f} MiB"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()

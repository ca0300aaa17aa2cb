"""An adapter store that is some way off: files over HTTP, each exchange with a delay."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


class FarStore:
    """``with FarStore(folder, delay_s) as store``: what is below ``folder`` can be read below ``store.url``.

    It answers every request ``delay_s`` late, any number of them at a time, in a process of its own.
    """

    def __init__(self, folder: Path, delay_s: float) -> None:
        self._folder = folder
        self._delay_s = delay_s

    def __enter__(self) -> FarStore:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(self._folder, self._delay_s, there), daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{here.recv()}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()


def _serve(folder: Path, delay_s: float, parent: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, delay_s, directory=str(folder))) as server:
        server.daemon_threads = True
        parent.send(server.server_address[1])
        server.serve_forever()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, delay_s: float, *args: Any, **options: Any) -> None:
        self._delay_s = delay_s
        super().__init__(*args, **options)

    def do_HEAD(self) -> None:
        time.sleep(self._delay_s)
        super().do_HEAD()

    def do_GET(self) -> None:
        time.sleep(self._delay_s)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        return

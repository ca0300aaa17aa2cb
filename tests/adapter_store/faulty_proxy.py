"""An HTTP proxy in front of a real server that breaks answers on demand.

    with FaultyProxy("http://127.0.0.1:9000") as proxy:
        proxy.fail(Fault("weights", status=503))
        proxy.endpoint  # give this to the client

Faults are those of ``HubServer``: queued, and used up in order by the requests that they match.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.adapter_store.hub_server import Fault

_HOP = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"})


class FaultyProxy:
    """The proxy. Methods may be called from any thread."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers in lower case
        #: Access key ids that are let through; None lets everyone.
        self.open_to: set[str] | None = None
        #: Whether the server's own checksums are passed on, by which clients notice damage before we do.
        self.pass_checksums = True
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            server_proxy = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, *faults: Fault) -> None:
        """Queue faults: each is used by the next request whose method and path it matches."""
        with self._lock:
            self._faults.extend(faults)

    def requests(self, part: str = "") -> list[str]:
        """``METHOD /path`` of the requests so far that contain ``part``."""
        with self._lock:
            return [line for line in (f"{method} {path}" for method, path, _ in self.seen) if part in line]

    def take_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault:
        with self._lock:
            self.seen.append((method, path, headers))
            for fault in self._faults:
                if fault.matches in f"{method} {path}":
                    self._faults.remove(fault)
                    return fault
        return Fault()

    def lets_in(self, authorization: str) -> bool:
        return self.open_to is None or any(f"Credential={key}/" in authorization for key in self.open_to)


class _Handler(BaseHTTPRequestHandler):
    server_proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._forward()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - named by the base class

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        return

    def _forward(self) -> None:
        proxy = self.server_proxy
        headers = {key.lower(): value for key, value in self.headers.items()}
        fault = proxy.take_fault(self.command, unquote(self.path), headers)
        sent = self.rfile.read(int(headers.get("content-length", 0)))
        if fault.delay_s:
            time.sleep(fault.delay_s)
        if fault.meeting is not None:
            try:
                fault.meeting.wait(timeout=10)
            except threading.BrokenBarrierError:
                fault = Fault(status=500)
        if fault.status or not proxy.lets_in(headers.get("authorization", "")):
            self._send(fault.status or 403, b"", fault.headers.items(), Fault())
            return
        connection = http.client.HTTPConnection(proxy.target, timeout=30)
        try:
            passed = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            connection.request(self.command, self.path, sent or None, passed)
            answer = connection.getresponse()
            kept = [(key, value) for key, value in answer.getheaders() if key.lower() not in _HOP]
            if not proxy.pass_checksums:
                kept = [(key, value) for key, value in kept if not key.lower().startswith("x-amz-checksum")]
            length = answer.getheader("Content-Length")
            self._send(answer.status, answer.read(), kept, fault, length)
        finally:
            connection.close()

    def _send(
        self, status: int, body: bytes, headers: Iterable[tuple[str, str]], fault: Fault, length: str | None = None
    ) -> None:
        sent = body
        if fault.corrupt and body:
            sent = body[:-1] + bytes([body[-1] ^ 0xFF])
        if fault.cut is not None:
            sent = body[: int(len(body) * fault.cut)]
            self.close_connection = True
        try:
            self.send_response(status)
            for key, value in headers:
                self.send_header(key, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up waiting

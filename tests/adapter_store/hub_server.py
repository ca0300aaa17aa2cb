"""A Hugging Face Hub for tests: a real HTTP server that speaks the part of its API that model downloads need.

    with HubServer() as hub:
        commit = hub.publish("acme/shout", {"adapter_config.json": b"...", "adapter_model.safetensors": b"..."})
        hub.endpoint  # http://127.0.0.1:<port>

Large files (``*.safetensors``, ``*.bin``) are LFS files: their resolve URL redirects to a signed URL on another host
name, as the Hub's content network does. Faults are queued per request and used up in order.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_a_secret_that_must_not_leak"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>.+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
_BLOB = re.compile(r"/cdn/(?P<sha>[0-9a-f]{64})")


@dataclass
class Repo:
    """One repository. access: "public", "private" (looks missing without the token) or "gated" (403 without it)."""

    access: str = "public"
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering properly.

    matches: part of the path. status: answer with it (0: answer properly after ``delay_s``). cut: send this fraction of
    the body and close. corrupt: flip the last byte of the body. headers: added to the answer. meeting (of
    ``FaultyProxy``): answer properly when all of its parties are here, with a 500 when they do not come.
    """

    matches: str = ""
    status: int = 0
    delay_s: float = 0.0
    cut: float | None = None
    corrupt: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    meeting: threading.Barrier | None = None


@dataclass(frozen=True)
class Seen:
    """One request that the server received. ``authorization`` is the header's value, None without one."""

    method: str
    path: str
    host: str
    authorization: str | None


class HubServer:
    """The server. Methods may be called from any thread."""

    def __init__(self, token: str = TOKEN, list_hashes: bool = True) -> None:
        """token: what opens private and gated repositories. list_hashes: whether listings carry LFS hashes."""
        self.token = token
        self.list_hashes = list_hashes
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering; later connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def publish(self, repo: str, files: Mapping[str, bytes], ref: str = "main", access: str = "public") -> str:
        """A new commit of ``repo`` that holds exactly ``files``; ``ref`` points to it. Returns the commit."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()), time.time_ns())).encode()).hexdigest()
        with self._lock:
            entry = self.repos.setdefault(repo, Repo())
            entry.access = access
            entry.commits[commit] = dict(files)
            entry.refs[ref] = commit
        return commit

    def fail(self, *faults: Fault) -> None:
        """Queue faults: each is used by the next request whose path it matches."""
        with self._lock:
            self._faults.extend(faults)

    def heal(self) -> None:
        """Forget the faults that are left."""
        with self._lock:
            self._faults.clear()

    def requests(self, part: str = "") -> list[Seen]:
        """The requests so far whose path contains ``part``."""
        with self._lock:
            return [seen for seen in self.seen if part in seen.path]

    def take_fault(self, seen: Seen) -> Fault | None:
        with self._lock:
            self.seen.append(seen)
            for fault in self._faults:
                if fault.matches in seen.path:
                    self._faults.remove(fault)
                    return fault
        return None

    def blob(self, sha: str) -> bytes | None:
        with self._lock:
            for repo in self.repos.values():
                for files in repo.commits.values():
                    for data in files.values():
                        if hashlib.sha256(data).hexdigest() == sha:
                            return data
        return None


class SilentHub(HubServer):
    """Says nothing about repositories called ``silent...`` until it is released. asked: once for each such request."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()
        self.asked = threading.Semaphore(0)

    def take_fault(self, seen: Seen) -> Fault | None:
        fault = super().take_fault(seen)
        if "/silent" in seen.path:
            self.asked.release()
            self.released.wait(60)
        return fault


def is_lfs(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        return

    def _answer(self, send_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        seen = Seen(self.command, path, self.headers.get("Host", ""), self.headers.get("Authorization"))
        fault = self.server_hub.take_fault(seen) or Fault()
        if fault.delay_s:
            time.sleep(fault.delay_s)
        if fault.status:
            self._send(fault.status, b'{"error": "fault"}', dict(fault.headers), send_body)
            return
        routes: tuple[tuple[re.Pattern[str], Callable[..., tuple[int, bytes, dict[str, str]]]], ...] = (
            (_API, self._model_info),
            (_RESOLVE, self._resolve),
            (_BLOB, self._lfs_blob),
        )
        for pattern, route in routes:
            match = pattern.fullmatch(path)
            if match is not None:
                status, body, headers = route(**match.groupdict())
                self._send(status, body, {**headers, **fault.headers}, send_body, fault)
                return
        self._send(404, b"{}", {}, send_body)

    def _open(self, repo: str, rev: str | None) -> tuple[Repo, str] | tuple[int, bytes, dict[str, str]]:
        entry = self.server_hub.repos.get(repo)
        trusted = self.headers.get("Authorization") == f"Bearer {self.server_hub.token}"
        if entry is None or (entry.access == "private" and not trusted):
            status = 404 if trusted else 401  # the Hub does not tell strangers what exists
            return status, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        if entry.access == "gated" and not trusted:
            return 403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"}
        commit = entry.refs.get(rev or "main", rev or "main")
        if commit not in entry.commits:
            return 404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"}
        return entry, commit

    def _model_info(self, repo: str, rev: str | None) -> tuple[int, bytes, dict[str, str]]:
        opened = self._open(repo, rev)
        if isinstance(opened[0], int):
            return opened  # type: ignore[return-value]
        entry, commit = opened
        siblings: list[dict[str, Any]] = []
        for file, data in entry.commits[commit].items():
            item: dict[str, Any] = {"rfilename": file, "size": len(data)}
            if self.server_hub.list_hashes:
                item["blobId"] = git_blob_id(data)
                if is_lfs(file):
                    item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(item)
        info = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }
        return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}

    def _resolve(self, repo: str, rev: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        opened = self._open(repo, rev)
        if isinstance(opened[0], int):
            return opened  # type: ignore[return-value]
        entry, commit = opened
        data = entry.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            return 404, b'{"error": "Entry not found"}', {**headers, "X-Error-Code": "EntryNotFound"}
        if not is_lfs(file):
            return 200, data, {**headers, "ETag": f'"{git_blob_id(data)}"'}
        sha = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data)), "ETag": f'"{git_blob_id(data)}"'}
        return 302, b"", {**headers, "Location": f"http://localhost:{self.server_hub.port}/cdn/{sha}?signature=s"}

    def _lfs_blob(self, sha: str) -> tuple[int, bytes, dict[str, str]]:
        data = self.server_hub.blob(sha)
        if data is None:
            return 404, b"", {}
        return 200, data, {"ETag": f'"{sha}"'}

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], send_body: bool, fault: Fault | None = None
    ) -> None:
        sent = body
        if fault is not None and fault.corrupt and body:
            sent = body[:-1] + bytes([body[-1] ^ 0xFF])
        if fault is not None and fault.cut is not None:
            sent = body[: int(len(body) * fault.cut)]
            self.close_connection = True
        try:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send_body:
                self.wfile.write(sent)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up waiting


@contextmanager
def hub_asked_without_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, whatever this machine's environment says of the real one."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer() as server:
        yield server

"""Adapters in folders of this machine (or of a file system mounted on it)."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from adapter_store.checkpoint_files import (
    MAX_CONFIG_BYTES,
    PICKLE_FILE,
    PICKLE_REMEDY,
    CheckpointFiles,
    Meanwhile,
    check_size,
)
from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest, git_blob_sha1
from adapter_store.errors import AdapterChanged, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapter_store.load_stats import LoadMeter, SourceStats
from adapter_store.source import AdapterRef, ResolvedAdapter, TemplateFile
from adapter_store.template_files import TEMPLATE_FILES, Templates, check_template_size, templates_in

# A file written this shortly before it was hashed could be written again within the same clock tick of its file
# system, so its hash is not remembered yet.
_SETTLED_NS = 100_000_000

_Signature = tuple[int, int, int, int]


class FileHashes:
    """Hashes of files, recomputed only when a file's device, inode, size or modification time differs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[_Signature, str]] = {}

    def get(self, path: Path, compute: Callable[[Path], str]) -> str:
        """The hash of ``path`` by ``compute``. Raises OSError when it cannot be read."""
        before = _signature(path)
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == before:
            return known[1]
        value = compute(path)
        settled = time.time_ns() - before[3] > _SETTLED_NS
        with self._lock:
            if settled and _signature(path) == before:
                self._known[path] = (before, value)
            else:
                self._known.pop(path, None)
        return value

    def forget(self, path: Path) -> None:
        """Hash the file again when it is next asked for."""
        with self._lock:
            self._known.pop(path, None)


class LocalSource:
    """Folders. Thread-safe. ``resolve`` costs four stats unless a file changed since it was last hashed."""

    def __init__(self) -> None:
        self._hashes = FileHashes()
        self._read = LoadMeter()

    def resolve(self, name: str, ref: AdapterRef) -> ResolvedAdapter:
        """The folder's content now. Raises AdapterNotFound without a config file, AdapterRefused without weights."""
        return ResolvedAdapter(name, ref, self._digest(name, Path(ref.id)), _template(ref.id))

    def fetch(
        self, resolved: ResolvedAdapter, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """The files as they are now.

        Raises AdapterNotFound when they are gone, AdapterChanged when they are no longer the resolved content.
        """
        if not (Path(resolved.ref.id) / CONFIG_FILE).is_file():
            raise AdapterNotFound(resolved.name, f"there is no {CONFIG_FILE} in its folder any more")
        with self._read.measure() as read:
            files = CheckpointFiles.read(Path(resolved.ref.id), resolved.name, max_weights_bytes, meanwhile)
            digest, read.bytes = files.digest(), files.nbytes
        if digest != resolved.digest:
            raise AdapterChanged(
                resolved.name, f"its content is now {digest[:12]}, not {resolved.digest[:12]}: it was published again"
            )
        return files

    def templates(self, resolved: ResolvedAdapter) -> Templates:
        """As the file is now. Raises AdapterRefused, and AdapterUnavailable when it went away just now."""
        assert resolved.template is not None
        file = resolved.template.file
        try:
            with (Path(resolved.ref.id) / file).open("rb") as opened:
                check_template_size(resolved.name, file, os.fstat(opened.fileno()).st_size)
                return templates_in(resolved.name, file, opened.read(TEMPLATE_FILES[file] + 1))
        except FileNotFoundError:
            raise AdapterUnavailable(resolved.name, f"its {file} is being replaced: try again in a moment") from None
        except OSError as error:
            raise AdapterRefused(resolved.name, f"{file} cannot be read: {error.strerror}") from error

    def recall(self, name: str, ref: AdapterRef) -> None:
        """Nothing: folders are looked at each time."""

    def at_hand(self, ref: AdapterRef, digest: str | None) -> bool:
        """Always: a folder is on this machine, or mounted as if it were."""
        del ref, digest
        return True

    def forget(self, ref: AdapterRef) -> None:
        """Hash the folder's files again, also where nothing tells that they changed."""
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self._hashes.forget(Path(ref.id) / file)

    def stats(self) -> SourceStats:
        """Reading alone: nothing is downloaded."""
        return SourceStats(read=self._read.totals)

    def close(self) -> None:
        """Nothing is held open."""

    def _digest(self, name: str, folder: Path) -> str:
        try:
            check_size(name, CONFIG_FILE, (folder / CONFIG_FILE).stat().st_size, MAX_CONFIG_BYTES)
            config = self._hashes.get(folder / CONFIG_FILE, lambda path: git_blob_sha1(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            raise AdapterNotFound(name, f"there is no {CONFIG_FILE} in its folder") from None
        except OSError as error:
            raise AdapterRefused(name, f"{CONFIG_FILE} cannot be read: {error.strerror}") from error
        try:
            weights = self._hashes.get(folder / WEIGHTS_FILE, sha256_file)
        except FileNotFoundError:
            pickle = (folder / PICKLE_FILE).exists()
            raise AdapterRefused(name, PICKLE_REMEDY if pickle else f"it has no {WEIGHTS_FILE}") from None
        except OSError as error:
            raise AdapterRefused(name, f"{WEIGHTS_FILE} cannot be read: {error.strerror}") from error
        return content_digest(config, weights)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _template(folder: str) -> TemplateFile | None:
    for file in TEMPLATE_FILES:
        try:
            found = os.stat(f"{folder}/{file}")  # noqa: PTH116 - follows links, and is the hot path of every request
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            now = time.time_ns()
            settled = now - found.st_mtime_ns > _SETTLED_NS  # else it is read each time, as weights are hashed
            return TemplateFile(file, f"{_signed(found)}" if settled else f"{_signed(found)} {now}")
    return None


def _signature(path: Path) -> _Signature:
    return _signed(os.stat(path))  # noqa: PTH116 - follows links, and is the hot path of every request


def _signed(found: os.stat_result) -> _Signature:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

"""Downloaded adapters on local disk, by digest, shared by every process that uses the same folder."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.errors import AdapterRefused
from adapter_store.load_stats import LoadMeter

_log = logging.getLogger(__name__)
_SCRATCH_PREFIX = ".incoming-"
_SCRATCH_MAX_AGE_S = 24 * 3600.0  # older ones belong to processes that died


class DiskCache:
    """``root/<digest>/`` holds the two files of one adapter; nothing appears there before it is complete.

    Entries come by rename, so readers in other processes see all of one or nothing. Beyond ``budget_bytes`` the entries
    that were read least recently go. Thread-safe.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self.reading = LoadMeter()

    def read(self, digest: str, name: str, max_weights_bytes: int | None) -> CheckpointFiles | None:
        """The content of ``digest``, verified, or None. An entry that is damaged is removed."""
        folder = self._root / digest
        if not self.holds(digest):
            return None
        try:
            with self.reading.measure() as work:
                files = CheckpointFiles.read(folder, name, max_weights_bytes)
                found, work.bytes = files.digest(), files.nbytes
        except AdapterRefused:
            if folder.is_dir():
                raise
            return None  # another process made room meanwhile
        if found != digest:
            _log.warning("cached adapter %s is damaged on disk and is fetched again", digest[:12])
            self._remove(folder)
            return None
        with contextlib.suppress(OSError):  # a read-only cache has no order of use
            now = time.time_ns()  # finer than the clock tick that the system would stamp
            os.utime(folder, ns=(now, now))
        return files

    def holds(self, digest: str) -> bool:
        """Whether there is an entry of ``digest`` now, not verified."""
        return (self._root / digest).is_dir()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder on the cache's file system, removed at the end unless it was adopted. Raises OSError."""
        self._root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=self._root))
        try:
            yield folder
        finally:
            self._remove(folder)

    def adopt(self, digest: str, folder: Path) -> None:
        """Make a scratch folder the entry of ``digest``. The caller has verified its content. Raises OSError."""
        try:
            folder.rename(self._root / digest)
        except OSError:
            if not (self._root / digest).is_dir():  # else another process was faster with the same content
                raise
        self._trim(keep=digest)

    def known_digest(self, key: str) -> str | None:
        """The digest remembered for an immutable ``key`` (letters, digits, dots, dashes), if its entry is here."""
        try:
            digest = (self._root / "refs" / key).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            return None
        return digest if len(digest) == 64 and digest.isalnum() and (self._root / digest).is_dir() else None

    def remember_digest(self, key: str, digest: str) -> None:
        """Remember the digest of an immutable ``key`` for later runs. Raises OSError."""
        refs = self._root / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        draft = refs / f"{_SCRATCH_PREFIX}{os.getpid()}-{key}"
        draft.write_text(digest, "ascii")
        draft.replace(refs / key)

    def _trim(self, keep: str) -> None:
        now = time.time()
        entries: list[tuple[float, int, Path]] = []
        for folder in self._root.iterdir():
            try:
                used = folder.stat().st_mtime
                if folder.name.startswith(_SCRATCH_PREFIX):
                    if now - used > _SCRATCH_MAX_AGE_S:
                        self._remove(folder)
                elif folder.name != "refs":
                    entries.append((used, sum(file.stat().st_size for file in folder.iterdir()), folder))
            except FileNotFoundError:
                continue  # removed by another process
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries, key=lambda entry: entry[0]):
            if total <= self._budget_bytes:
                break
            if folder.name != keep:
                self._remove(folder)
                total -= size

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

"""Downloaded adapters on local disk, by digest, shared by every process of this machine that uses the same folder."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapter_store.checkpoint_files import CheckpointFiles, Meanwhile
from adapter_store.errors import AdapterRefused
from adapter_store.file_lock import file_lock
from adapter_store.load_stats import DiskCacheStats, LoadMeter

_log = logging.getLogger(__name__)
_INCOMING = ".incoming-"  # + key: a download under way, or one whose process died
_OURS = frozenset({"states", "locks"})  # folders that are no entries
_GONE = ".gone-"  # + digest: an entry being deleted
_ADOPT_WAIT_S = 30.0  # making room takes milliseconds; a process that was stopped meanwhile holds the others up so long
_STATE_MAX_AGE_S = 30 * 24 * 3600.0
_SWEEP_EVERY_S = 24 * 3600.0
# A folder listed this shortly after it changed could change again within the same clock tick of its file system.
_SETTLED_NS = 100_000_000


class DiskCache:
    """``root/<digest>/`` holds the two files of one adapter; nothing appears there before it is complete.

    Entries come and go by rename, so readers in other processes see all of one or nothing. ``budget_bytes`` bounds the
    entries; those that were read least recently make room. Downloads under way are beside it. Thread-safe.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._next_sweep = 0.0
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._listed: int | None = None  # the folder's modification time (ns) when _sizes was all of it
        self.reading = LoadMeter()

    def read(
        self, digest: str, name: str, max_weights_bytes: int | None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles | None:
        """The content of ``digest``, verified, or None. An entry that is damaged is removed.

        Raises AdapterRefused when its weights are larger than ``max_weights_bytes``.
        """
        folder, files, found = self._root / digest, None, None
        with _opened(folder) as entry:
            if entry is None:
                return None
            try:
                with self.reading.measure() as work:
                    files = CheckpointFiles.read(folder, name, max_weights_bytes, meanwhile)
                    found, work.bytes = files.digest(), files.nbytes
            except AdapterRefused:
                if entry.stands() and entry.whole():
                    raise  # else another process made room meanwhile, or a file was taken away
            if files is None or found != digest:
                if entry.stands():
                    _log.warning("cached adapter %s is damaged on disk and is fetched again", digest[:12])
                    self._remove(digest)
                return None
        with contextlib.suppress(OSError):  # a read-only cache has no order of use
            now = time.time_ns()  # finer than the clock tick that the system would stamp
            os.utime(folder, ns=(now, now))
        return files

    def holds(self, digest: str) -> bool:
        """Whether there is an entry of ``digest`` now, not verified."""
        return (self._root / digest).is_dir()

    def sizes(self) -> dict[str, int]:
        """Bytes of every entry, by digest. Lists the folder only where something came or went since the last time, and
        looks at an entry once: its content never changes. Where the disk cannot be read, what was known last."""
        with self._lock, contextlib.suppress(OSError):
            if not self._root.exists():
                self._sizes, self._listed = {}, None
            elif (changed := self._root.stat().st_mtime_ns) != self._listed:
                settled = time.time_ns() - changed > _SETTLED_NS
                self._sizes = self._list()
                self._listed = changed if settled else None
        return dict(self._sizes)

    def stats(self) -> DiskCacheStats:
        """What is held now, by all processes; as cheap as ``sizes``."""
        sizes = self.sizes()
        return DiskCacheStats(len(sizes), sum(sizes.values()), self._budget_bytes)

    @contextlib.contextmanager
    def exclusive(self, key: str, wait_s: float) -> Iterator[Path]:
        """The right to bring ``key`` here, for one thread on this machine, and an empty folder to do it in.

        key: 64 hex digits. The folder is removed at the end unless it was adopted; what a process that died left in it
        is removed at the beginning. Raises TimeoutError when someone else has the right for ``wait_s``, and OSError.
        """
        with file_lock(self._lock_path(key), wait_s):
            folder = self._root / f"{_INCOMING}{key}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, digest: str, folder: Path) -> None:
        """Make a folder the entry of ``digest``, unless it is larger than the whole budget.

        The caller has verified its content. Raises OSError, and TimeoutError when others keep it from making room.
        """
        size = _size(folder)
        if size > self._budget_bytes:
            _log.warning("adapter %s has %d bytes, more than cache_bytes: it is not kept", digest[:12], size)
            return
        with file_lock(self._lock_path("adopt"), _ADOPT_WAIT_S):
            if not self.holds(digest):  # else it came under another name, or another process was faster
                self._make_room(size)
                folder.rename(self._root / digest)

    def known_digest(self, state: str) -> str | None:
        """The digest remembered for a ``state`` of a server's files (64 hex digits)."""
        digest = self.known_note(state)
        return digest if digest is not None and len(digest) == 64 and digest.isalnum() else None

    def remember_digest(self, state: str, digest: str) -> None:
        """Remember which content a ``state`` is, for later runs. Raises OSError."""
        self.remember_note(state, digest)

    def known_note(self, state: str) -> str | None:
        """What ``remember_note`` was told of a ``state``."""
        try:
            return (self._root / "states" / state).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            return None

    def remember_note(self, state: str, text: str) -> None:
        """Remember some ASCII text of a ``state``, for later runs. Raises OSError."""
        states = self._root / "states"
        states.mkdir(parents=True, exist_ok=True)
        draft = states / f".{os.getpid()}-{state}"
        draft.write_text(text, "ascii")
        draft.replace(states / state)

    def forget_digest(self, state: str) -> None:
        """Drop what is remembered of a ``state``."""
        with contextlib.suppress(OSError):
            (self._root / "states" / state).unlink()

    def _list(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for folder in self._root.iterdir():
            name = folder.name
            if not name.startswith(".") and name not in _OURS:
                with contextlib.suppress(FileNotFoundError):  # removed by another process
                    found[name] = self._sizes[name] if name in self._sizes else _size(folder)
        return found

    def _lock_path(self, key: str) -> Path:
        return self._root / "locks" / key

    def _make_room(self, size: int) -> None:
        entries: list[tuple[float, int, str]] = []
        for folder in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                if folder.name.startswith(_INCOMING):
                    self._remove_abandoned(folder)
                elif folder.name.startswith(_GONE):
                    shutil.rmtree(folder, ignore_errors=True)
                elif folder.name not in _OURS:
                    entries.append((folder.stat().st_mtime, _size(folder), folder.name))
        total = size + sum(entry[1] for entry in entries)
        for _, freed, digest in sorted(entries):
            if total <= self._budget_bytes:
                break
            self._remove(digest)
            total -= freed
        self._sweep_states()

    def _remove_abandoned(self, folder: Path) -> None:
        """Remove a download whose process died: nobody has the right to it."""
        try:
            with file_lock(self._lock_path(folder.name.removeprefix(_INCOMING)), 0):
                shutil.rmtree(folder, ignore_errors=True)
        except TimeoutError:
            pass  # it is under way

    def _remove(self, digest: str) -> None:
        """At once for readers, whatever the deletion takes."""
        gone = self._root / f"{_GONE}{digest}-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):  # another process was faster, or the cache is read-only
            (self._root / digest).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _sweep_states(self) -> None:
        """Once a day, forget states that were not written for a month; a server still in them is read again."""
        if time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + _SWEEP_EVERY_S
        oldest = time.time() - _STATE_MAX_AGE_S
        with contextlib.suppress(FileNotFoundError):
            for file in (self._root / "states").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime < oldest:
                        file.unlink()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@dataclass(frozen=True, slots=True)
class _OpenEntry:
    """An entry's folder, held open: what comes under the same name meanwhile is seen to be another one."""

    path: Path
    descriptor: int

    def stands(self) -> bool:
        """Whether the name still means this folder."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.descriptor))
        except OSError:
            return False

    def whole(self) -> bool:
        return len(os.listdir(self.descriptor)) >= 2  # noqa: PTH208  # a descriptor is no path


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[_OpenEntry | None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield None
        return
    try:
        yield _OpenEntry(folder, descriptor)
    finally:
        os.close(descriptor)

"""One holder at a time among all processes of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_SHORTEST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1


@contextlib.contextmanager
def file_lock(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock ``path`` for the block; threads of one process exclude each other too.

    The system takes it from a process that ends, however it ends. The file is there only while someone holds or wants
    the lock. Raises TimeoutError when it is not free within ``wait_s`` (0: at once), and OSError.
    """
    deadline, pause = time.monotonic() + wait_s, _SHORTEST_PAUSE_S
    while (descriptor := _try_lock(path)) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{path.name} is held by another process or thread")
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # while it is held: who waits on this file sees that it is no longer the lock
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock, None when someone else has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours, named = os.fstat(descriptor), path.stat()
        if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None

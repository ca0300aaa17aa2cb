"""The keys file as it is now: read again when it changes, taken over whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from deployments.background import Background
from deployments.tenants.caller import Caller
from deployments.tenants.key_table import KeyTable

LOOK_SECONDS = 1.0
MAX_BYTES = 16 << 20

logger = logging.getLogger("ray.serve")


class LiveKeys(Background):
    """The ``KeyTable`` in force. A file that is missing or holds a mistake changes nothing, and is told in the log."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError when there is nothing to begin with."""
        self._file = file
        self._seen, self.table = _read(file)
        #: Why the file is not in force as it is now; None when it is.
        self.refused: str | None = None

    def caller(self, key: str) -> Caller | None:
        """See ``KeyTable``."""
        return self.table.caller(key)

    def look(self) -> None:
        """Read the file, and put it into force if it has changed. Blocks on the disk."""
        try:
            content = _content(self._file)
            if content == self._seen and self.refused is None:
                return
            seen, table = _read(self._file, content)
        except ValueError as error:
            if str(error) != self.refused:
                self.refused = str(error)
                logger.error("the keys in force stay as they were: %s", error)
            return
        self._seen, self.table, self.refused = seen, table, None
        logger.info("%s: %d tenants", self._file, len(table.tenants))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.look)


def _read(file: Path, content: bytes | None = None) -> tuple[bytes, KeyTable]:
    content = _content(file) if content is None else content
    try:
        return content, KeyTable.parse(content.decode())
    except UnicodeDecodeError:
        raise ValueError(f"keys file {file}: it is no text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"keys file {file}: {error}") from None


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"keys file {file} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"keys file {file} has more than {MAX_BYTES} bytes")
    return content

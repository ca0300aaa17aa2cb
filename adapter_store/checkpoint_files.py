"""The two files of an adapter, held in memory: what is hashed is exactly what is packed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapter_store.digest import CONFIG_FILE, WEIGHTS_FILE, content_digest, git_blob_sha1
from adapter_store.errors import AdapterRefused
from adapter_store.spare_memory import SpareMemory

MAX_CONFIG_BYTES = 1 << 20
_CHUNK = 4 << 20  # bytes
_SPARE = SpareMemory(512 << 20)  # for every reader of the process, as an allocator's memory is
PICKLE_FILE = "adapter_model.bin"
PICKLE_REMEDY = (
    f"its weights are a pickle ({PICKLE_FILE}), which is never opened; convert them to {WEIGHTS_FILE}, for example by "
    "loading them where they are trusted and saving with PEFT's save_pretrained"
)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """adapter_config.json, and the bytes of adapter_model.safetensors as a 1-D uint8 tensor.

    sha256: of ``weights``, hex digits, once another thread is through them: hashing takes longer than all else.
    memory: what ``weights`` is the beginning of.
    """

    config: bytes
    weights: Tensor
    sha256: Future[str]
    memory: Tensor

    @classmethod
    def read(
        cls, folder: Path, name: str, max_weights_bytes: int | None = None, meanwhile: Meanwhile | None = None
    ) -> CheckpointFiles:
        """Read both files. Raises AdapterRefused when one is missing, too large, or only a pickle is there.

        meanwhile: called with them while they are hashed.
        """
        config, *_ = _read(folder / CONFIG_FILE, name, MAX_CONFIG_BYTES)
        if not (folder / WEIGHTS_FILE).is_file() and (folder / PICKLE_FILE).is_file():
            raise AdapterRefused(name, PICKLE_REMEDY)
        files = cls(config.numpy().tobytes(), *_read(folder / WEIGHTS_FILE, name, max_weights_bytes))
        if meanwhile is not None:
            meanwhile(files)
        return files

    @property
    def nbytes(self) -> int:
        return len(self.config) + self.weights.numel()

    def discard(self) -> None:
        """Leave the memory to the next files that are read: ``weights`` and its views are void from here on."""
        _SPARE.give(self.memory)

    def digest(self) -> str:
        """The content's identity (``content_digest``), 64 hex digits. Waits for the hash."""
        return content_digest(git_blob_sha1(self.config), self.sha256.result())


#: Work on files that goes on while they are hashed. What it makes counts only once the files are found to be the right
#: ones, so it raises nothing that belongs to them.
Meanwhile = Callable[[CheckpointFiles], None]


def check_size(name: str, file: str, size: int, limit: int | None) -> None:
    """Raise AdapterRefused when a file of ``size`` bytes cannot belong to an adapter of at most ``limit``."""
    if limit is not None and size > limit:
        raise AdapterRefused(name, f"{file} has {size} bytes; at most {limit} can belong to an adapter served here")


def _read(path: Path, name: str, limit: int | None) -> tuple[Tensor, Future[str], Tensor]:
    """A file's bytes, their sha256 to come, and the memory that the bytes are the beginning of."""
    sha256, hasher = hashlib.sha256(), ThreadPoolExecutor(1)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            check_size(name, path.name, size, limit)
            memory = _SPARE.take(size)
            view, done = memory.numpy().data, 0
            while done < size and (count := file.readinto(view[done : done + _CHUNK])):
                hasher.submit(sha256.update, view[done : done + count])
                done += count
            return memory[:done], hasher.submit(sha256.hexdigest), memory
    except FileNotFoundError:
        raise AdapterRefused(name, f"it has no {path.name}") from None
    except OSError as error:
        raise AdapterRefused(name, f"{path.name} cannot be read: {error.strerror}") from error
    finally:
        hasher.shutdown(wait=False)  # it ends when it is through

"""Calls on a file system of fsspec's, several at a time where it is an asynchronous one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Info = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A file system's method on one file below a URL, "" for the URL itself. ``args`` come after the file's URL."""

    method: str
    file: str
    args: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def on(self, system: AbstractFileSystem, url: str, prefix: str = "") -> Any:
        """What it returns there. prefix: "_" for the coroutine that an asynchronous file system has of each method."""
        return getattr(system, prefix + self.method)(f"{url}/{self.file}", *self.args, **self.options)


def answers(system: AbstractFileSystem, url: str, calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """What each call returns, or the exception that it raises, in the order of the calls.

    Asynchronous file systems have all of them under way at once, and ``timeout_s`` for them together: they raise
    TimeoutError. Others take one call after the other, as long as that takes.
    """
    if not system.async_impl:
        return [_answer(system, url, call) for call in calls]
    from fsspec.asyn import sync  # noqa: PLC0415 - with the store's package, an extra

    async def work() -> list[Any]:
        return await asyncio.gather(*(call.on(system, url, "_") for call in calls), return_exceptions=True)

    given: Any = sync(getattr(system, "loop"), work, timeout=timeout_s)  # noqa: B009
    return given


def returned(given: Sequence[Any]) -> list[Any]:
    """The same answers; raises the first that is an exception."""
    for one in given:
        if isinstance(one, BaseException):
            raise one
    return list(given)


def file_info(answer: Any) -> Info | None:
    """What a call of ``info`` said of a file, None where there is none. Raises any other exception it raised."""
    if isinstance(answer, FileNotFoundError):
        return None
    (info,) = returned([answer])
    return info if info.get("type") == "file" else None


def _answer(system: AbstractFileSystem, url: str, call: Call) -> Any:
    try:
        return call.on(system, url)
    except Exception as error:
        return error

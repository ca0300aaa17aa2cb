"""What benchmarks' command lines have in common: types for ``argparse``."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", bound=str)


def some_of(choices: Iterable[Name]) -> Callable[[str], list[Name]]:
    """Parses names with commas between them, each one of ``choices``."""
    known = {str(choice): choice for choice in choices}

    def chosen(text: str) -> list[Name]:
        names = text.split(",")
        if unknown := sorted(set(names) - known.keys()):
            raise ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return [known[name] for name in names]

    return chosen


def picture(text: str) -> Path:
    """Parses where to draw to: refused before anything is measured where nothing can draw."""
    if find_spec("matplotlib") is None:
        raise ArgumentTypeError("drawing takes matplotlib, which is not installed: pip install -e '.[bench]'")
    return Path(text)

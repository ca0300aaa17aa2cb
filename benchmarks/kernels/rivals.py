"""Other people's kernels, given on the command line, that are timed in place of ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

OPS = ("expand", "shrink")


@dataclass(frozen=True, slots=True)
class Rival:
    """A function that takes the arguments of ``bgmv_expand`` or ``bgmv_shrink`` (``op``), by position."""

    op: str
    target: str

    @classmethod
    def parse(cls, text: str) -> Rival:
        """``[expand=|shrink=]module:function`` or ``[expand=|shrink=]path/to/file.py:function``; expand by default.

        Raises ValueError for anything else.
        """
        op, found, target = text.partition("=")
        if not found:
            op, target = "expand", text
        module, _, function = target.rpartition(":")
        if op not in OPS or not module or not function.isidentifier():
            raise ValueError(f"rival {text!r}: give [expand=|shrink=]module:function or [..]path/to/file.py:function")
        return cls(op, target)

    @property
    def name(self) -> str:
        """The module's own name."""
        module = self.target.rpartition(":")[0]
        return Path(module).stem if module.endswith(".py") else module.rpartition(".")[2]

    def load(self) -> Callable[..., Any]:
        """Import the module, once a process, and return the function.

        Raises ImportError or AttributeError when there is none.
        """
        module, _, function = self.target.rpartition(":")
        return getattr(
            _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), function
        )


@lru_cache
def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rival_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

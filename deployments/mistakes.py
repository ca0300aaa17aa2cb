"""What pydantic finds wrong with settings, as lines that name the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def told(error: ValidationError, before: str, model: type[BaseModel]) -> Iterator[str]:
    """One line a mistake. before: what stands in front of every place, such as ``args.``; model: what was checked."""
    for one in error.errors():
        where = [str(part) for part in one["loc"]]
        message = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = unknown(_keys(model, where[:-1]))
        # What is found wrong between fields has no place of its own, and begins with it.
        yield f"{before}{'.'.join(where)}: {message}" if where else f"{before}{message}"


def unknown(known: list[str]) -> str:
    """What to say of a key that there is not."""
    return f"unknown key; known are {', '.join(known)}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the section at ``path``, which may lead through a mapping of names to sections."""
    here: Any = model
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = here.model_fields[part].annotation if part in here.model_fields else None
        else:
            here = next(iter(get_args(here)[1:]), None)
        if isinstance(here, type) and issubclass(here, BaseModel):
            model = here
    return sorted(model.model_fields)

"""What pydantic finds wrong with settings, as lines that name the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterator

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
    """The keys of the section at ``path``."""
    for part in path:
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return sorted(model.model_fields)

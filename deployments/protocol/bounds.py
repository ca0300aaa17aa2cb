"""How much of what a client may name there may be, where more would cost others."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticCustomError

# What clients' own generators make stays far below; each level is a call of every reader on the way.
MOST_LEVELS = 64
MOST_SCHEMA_BYTES = 2**16


def check_levels(value: Any, param: str) -> None:
    """Raises PydanticCustomError for JSON of more than ``MOST_LEVELS`` levels."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise PydanticCustomError(
        "levels", "{param} has more than {most} levels of lists and objects", {"param": param, "most": MOST_LEVELS}
    )


def schema_text(schema: Any) -> str:
    """A JSON schema as text. Raises PydanticCustomError for one of more than ``MOST_SCHEMA_BYTES``."""
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PydanticCustomError("schema", "the schema holds a lone surrogate: no valid Unicode") from None
    except ValueError:
        raise PydanticCustomError("schema", "the schema holds a number that is none: NaN or an infinity") from None
    if size > MOST_SCHEMA_BYTES:
        raise PydanticCustomError(
            "schema", "the schema has {bytes} bytes: at most {most}", {"bytes": size, "most": MOST_SCHEMA_BYTES}
        )
    return text

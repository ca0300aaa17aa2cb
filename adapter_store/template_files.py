"""The files that say with which templates chats are written down, as Hugging Face repositories have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adapter_store.errors import AdapterRefused

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 256 << 10
#: Most bytes by file, the first that is there first: the second says something where it has a ``chat_template``.
TEMPLATE_FILES: Mapping[str, int] = {TEMPLATE_FILE: MAX_TEMPLATE_BYTES, "tokenizer_config.json": 4 << 20}

#: Template name -> Jinja text; empty where there is none.
Templates = Mapping[str, str]


def templates_in(adapter: str, file: str, data: bytes) -> Templates:
    """What one of ``TEMPLATE_FILES`` says. Raises AdapterRefused where it is too large or broken."""
    check_template_size(adapter, file, len(data))
    try:
        text = data.decode()
        config = {"chat_template": text} if file == TEMPLATE_FILE else json.loads(text)
        found = named_templates(config.get("chat_template") if isinstance(config, dict) else None)
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(adapter, f"{file} cannot be read: {error}") from None
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in found.values())
    if size > MAX_TEMPLATE_BYTES:
        raise AdapterRefused(adapter, f"its chat template has {size} bytes; at most {MAX_TEMPLATE_BYTES} are read")
    return found


def named_templates(said: Any) -> Templates:
    """A configuration's ``chat_template``: one text, or several with names, written in one of two ways.

    Raises ValueError for anything else.
    """
    if not said:
        return {}
    if isinstance(said, str):
        return {"default": said}
    if isinstance(said, list) and all(isinstance(one, dict) for one in said):
        said = {one.get("name"): one.get("template") for one in said}
    if not isinstance(said, dict) or not all(isinstance(text, str) for pair in said.items() for text in pair):
        raise ValueError("chat_template is neither a text nor texts with names")
    return said


def check_template_size(adapter: str, file: str, size: int) -> None:
    """Raise AdapterRefused for a file of more than its most bytes."""
    if size > TEMPLATE_FILES[file]:
        raise AdapterRefused(adapter, f"{file} has {size} bytes; at most {TEMPLATE_FILES[file]} are read")

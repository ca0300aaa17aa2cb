"""``GET /v1/models``: the base model and the adapters that clients may name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def model_object(name: str, created: int, *, root: str, parent: str | None = None) -> dict[str, Any]:
    """One model. root: what its weights are. parent: the base model's name, for an adapter."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lorafleet",
        "root": root,
        "parent": parent,
    }


def model_list(models: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's list envelope."""
    return {"object": "list", "data": list(models)}

"""``/v1/adapters`` and vLLM's two endpoints: bodies and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from adapter_store.names import NamedAdapter


class AdapterBody(BaseModel):
    """``POST /v1/adapters``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = Field(max_length=255, description="What clients will put in model.")
    reference: str = Field(max_length=4096, description="local:/folder or hub:org/name@revision.")
    pinned: bool = Field(False, description="Keep it in a slot of every replica.")
    replace: bool = Field(False, description="Let a name that was declared at run time stand for something else.")


class LoadLoraBody(BaseModel):
    """vLLM's ``POST /v1/load_lora_adapter``. Fields of its that mean nothing here are ignored."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadLoraBody(BaseModel):
    """vLLM's ``POST /v1/unload_lora_adapter``. wait_s is ours: seconds for running requests to end."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = ""
    wait_s: float = 30.0


def adapter_object(
    named: NamedAdapter, digest: str | None, held: Mapping[str, Mapping[str, Any]], *, pinned: bool
) -> dict[str, Any]:
    """One adapter. digest: None when it was not looked up yet. held: ``ReplicaAdapters.held()`` by replica."""
    slots = [replica for replica, one in held.items() if digest in one["slots"]]
    host = [replica for replica, one in held.items() if digest in one["host"]]
    ranks = [one["slots"][digest] for one in held.values() if digest in one["slots"]]
    return {
        "object": "adapter",
        "name": named.name,
        "reference": str(named.ref),
        "origin": named.origin,
        "digest": digest,
        "rank": ranks[0] if ranks else None,
        "state": "resident" if slots else "host" if host else "not_loaded",
        "pinned": pinned,
        "slots": sorted(slots),
        "host": sorted(host),
        "requests": sum(one["requests"].get(digest, 0) for one in held.values()),
    }

"""Who uses an adapter of a replica, and letting go of it, on a real engine."""

from __future__ import annotations

import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterNotFound
from deployments.adapters import replica_adapters
from deployments.adapters.replica_adapters import ReplicaAdapters

from .conftest import STORE


async def test_a_request_that_was_on_its_way_when_its_adapter_was_unloaded_does_not_bring_it_back(engine, monkeypatch):
    resolved = Catalog(STORE).resolve("json")
    adapters = ReplicaAdapters(engine)
    await adapters.prefetch(str(resolved.ref), resolved.digest)
    assert resolved.digest in adapters.held()["slots"]
    assert await adapters.unload(resolved.digest, 0.0)
    held = adapters.held()
    assert resolved.digest not in held["slots"] and resolved.digest not in held["host"]
    with pytest.raises(AdapterNotFound, match="unloaded"), adapters.used_by_request("json", resolved.digest):
        raise AssertionError("it was let in")
    with adapters.used_by_request("other", "another digest"), adapters.used_by_request(None, None):
        assert adapters.held()["requests"] == {"another digest": 1}
    await adapters.prefetch(str(resolved.ref), resolved.digest)  # it is wanted again
    with adapters.used_by_request("json", resolved.digest):
        assert not await adapters.unload(resolved.digest, 0.0)
        assert resolved.digest in adapters.held()["slots"], "refused whole: nothing was freed"
        with adapters.used_by_request("json", resolved.digest):
            assert adapters.held()["requests"] == {resolved.digest: 2}, "and new requests are let in again"
    monkeypatch.setattr(replica_adapters, "LATE_SECONDS", 0.0)
    assert await adapters.unload(resolved.digest, 0.0)
    with adapters.used_by_request("json", resolved.digest):
        assert adapters.held()["requests"] == {resolved.digest: 1}, "the time is over"

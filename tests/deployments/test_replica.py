"""What is left of a replica that could not be made."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployments.replica import LoraReplica


async def test_the_end_of_a_replica_that_could_not_be_made_hides_no_reason():
    replica = LoraReplica.__new__(LoraReplica)  # as Serve makes them, so that it can await both
    with pytest.raises(ValidationError, match="max_rows"):
        await replica.__init__({"model": "examples/demo/model", "engine": {"max_rows": "many"}})
    await replica.__del__()  # raises nothing
    assert replica._draining

"""The server keeps to its OpenAPI document and to the schemas it is given. ``make fuzz`` asks for more of both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.fuzz import PARTS, fuzz
from tests.api.schemas import check
from tests.api.served import served
from tests.deployments.conftest import BASE_MODEL


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as address:
        yield address


def test_random_requests_are_answered_as_documented_and_never_with_a_5xx(url):
    counts = fuzz(url, 80, BASE_MODEL)
    assert counts.total() >= 70, counts
    for path in {path for path, _, _ in PARTS} - {"/v1/models/{name}", "/"}:
        assert any(f" {path} 200" in line for line in counts), (path, counts)


def test_outputs_of_random_schemas_are_valid(url):
    outputs = check(url, BASE_MODEL, 20)
    assert len(set(outputs)) > 10

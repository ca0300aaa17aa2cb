"""Shared by the store's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.adapter_store.hub_server import HubServer, hub_asked_without_token


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, which is asked without a token."""
    with hub_asked_without_token(monkeypatch) as server:
        yield server

"""Shared by the store's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.adapter_store.hub_server import HubServer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads."""
    torch.set_num_threads(1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of the test's own, which is asked without a token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with HubServer() as server:
        yield server

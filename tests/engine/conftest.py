"""Shared by the engine's tests: tiny models made on the fly, each once per run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.oracle import TinyModel, build_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny products gain nothing from threads, and results then do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """``tiny_model("llama", **config)``: a random checkpoint, shared by all tests that ask for the same."""
    made: dict[str, TinyModel] = {}

    def make(model_type: str, **config: Any) -> TinyModel:
        key = f"{model_type} {sorted(config.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("tiny") / f"{model_type}-{len(made)}"
            made[key] = build_tiny_model(path, model_type, **config)
        return made[key]

    return make

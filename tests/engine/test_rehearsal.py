"""The rehearsal before serving: every size of step runs, and a service afterwards is not disturbed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.parts import build_parts
from engine.rehearsal import _shapes, rehearse
from tests.engine.engines import settings_for
from tests.engine.oracle import TinyModel


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_rows": 1, "max_batch_tokens": 1},
        {"max_rows": 5, "max_batch_tokens": 600, "page_size": 16},
        {"max_rows": 3, "max_model_len": 2},
        {"slots": ()},
    ],
)
def test_every_size_of_step_runs(tiny_model: Callable[..., TinyModel], limits: dict[str, Any]) -> None:
    settings = settings_for(tiny_model("llama"), **limits)
    parts = build_parts(settings, None)
    shapes = list(_shapes(settings, parts.max_model_len))
    assert max(rows * length for rows, length in shapes) >= min(settings.max_batch_tokens, parts.max_model_len - 1)
    assert {settings.max_rows} <= {rows for rows, _ in shapes}
    assert all(0 < length < parts.max_model_len for _, length in shapes)
    rehearse(parts.runner, settings, parts.max_model_len)
    if parts.slots is not None:
        assert parts.slots.residency().adapters == {}
        assert parts.slots.stats().misses == 0

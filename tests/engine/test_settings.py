"""Engine settings: what is refused, and that the message names the field, its value and the remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from engine.settings import EngineSettings


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model": ""}, "model is '' but must be the path"),
        ({"dtype": "int8"}, "dtype is 'int8' but must be one of auto, float32"),
        ({"device": "tpu"}, "device is 'tpu' but must be one of auto, cpu, cuda"),
        ({"page_size": 0}, "page_size is 0"),
        ({"num_pages": 0}, "num_pages is 0 but must be 1 or more, or unset"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"max_waiting": -1}, "max_waiting is -1"),
        ({"max_overtakes": -1}, "max_overtakes is -1"),
        ({"kv_memory_fraction": 0.0}, r"kv_memory_fraction is 0\.0 but must be above 0"),
        ({"kv_memory_fraction": 1.5}, r"kv_memory_fraction is 1\.5"),
        ({"seed": -3}, "seed is -3"),
        ({"load_threads": 0}, "load_threads is 0"),
        ({"max_rows": 64, "max_batch_tokens": 32}, r"max_batch_tokens is 32 but must be at least max_rows \(64\)"),
        ({"slots": {0: 4}}, r"slots is \{0: 4\} but must be ranks and counts of 1 or more"),
        ({"slots": {8: 0}}, "ranks and counts of 1 or more"),
        ({"slots": ((8, 1), (8, 2))}, "add up the counts"),
        ({"slots": {"big": 2}}, r"slots is \{'big': 2\}: write ranks and counts"),
        ({"slots": (4, 8)}, "write ranks and counts"),
    ],
)
def test_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EngineSettings(**{"model": "m", **values})


def test_slots_are_pairs_sorted_by_rank_however_they_are_written() -> None:
    slots = ((8, 2), (64, 1))
    mapping: Any = {64: 1, "8": 2}  # JSON has text keys
    assert EngineSettings("m", slots=mapping).slots == slots
    lists: Any = [[64, 1], [8, 2]]
    assert EngineSettings("m", slots=lists).slots == slots
    assert EngineSettings("m", slots=slots).max_rank == 64
    assert EngineSettings("m", slots=()).max_rank == 0


def test_from_dict_names_unknown_keys() -> None:
    assert EngineSettings.from_dict({"model": "m", "max_rows": 3}) == EngineSettings("m", max_rows=3)
    with pytest.raises(ValueError, match="unknown engine settings max_row; known are cpu_threads, cuda_graphs, device"):
        EngineSettings.from_dict({"model": "m", "max_row": 3})


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineSettings("m").max_rows = 3  # pyright: ignore[reportAttributeAccessIssue]

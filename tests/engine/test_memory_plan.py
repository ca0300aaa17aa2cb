"""What a plan says that GPU memory goes to is what an engine allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.memory_plan import MemoryPlan, page_bytes, slab_bytes, weight_elements
from engine.model import DecoderModel
from engine.parts import build_parts
from engine.settings import EngineSettings
from engine.spec import ModelSpec

DEMO = Path(__file__).parents[2] / "examples/demo/model"
GIB = 2**30


def test_a_plan_is_what_an_engine_allocates() -> None:
    settings = EngineSettings(str(DEMO), slots=((4, 3), (16, 2)), num_pages=40, device="cpu", max_rows=4)
    parts = build_parts(settings, None)
    assert parts.slots is not None
    plan = MemoryPlan.of(parts.spec, settings, torch.float32, GIB, 0)
    assert plan.weights == sum(tensor.nbytes for _, tensor in parts.runner.model.checkpoint_tensors())
    assert sum(plan.slots.values()) == parts.slots.arena.nbytes
    assert plan.slots[16] == 2 * slab_bytes(parts.slots.layout, 16, torch.float32)
    caches = (*parts.runner.kv.keys, *parts.runner.kv.values)
    assert plan.pages * plan.page == sum(cache.nbytes for cache in caches)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tie_word_embeddings": True},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"qk_norm": True},
    ],
)
def test_every_weight_is_counted(changed: dict[str, bool]) -> None:
    spec = replace(ModelSpec.from_dir(DEMO), **changed)
    model = DecoderModel(spec, torch.float32, torch.device("cpu"), 64)
    assert weight_elements(spec) == sum(tensor.numel() for _, tensor in model.checkpoint_tensors())


def test_what_is_left_goes_to_the_cache() -> None:
    spec = ModelSpec.from_dir(DEMO)
    settings = EngineSettings(str(DEMO), slots=((4, 1),), max_rows=64, kv_memory_fraction=0.5)
    page = page_bytes(spec, settings.page_size, torch.bfloat16)
    least = MemoryPlan.of(spec, settings, torch.bfloat16, 0, 0)
    assert (least.pages, least.free < 0) == (0, True)
    plan = MemoryPlan.of(spec, settings, torch.bfloat16, 20 * page - least.free, 0)
    assert plan.pages == 10
    assert plan.tokens == 10 * settings.page_size


def test_pages_that_no_row_could_fill_are_not_made() -> None:
    spec = ModelSpec.from_dir(DEMO)
    plan = MemoryPlan.of(spec, EngineSettings(str(DEMO), max_rows=2), torch.bfloat16, 80 * GIB, 0)
    assert plan.tokens == 2 * spec.max_position_embeddings

"""Merged adapters: what PEFT's add_weighted_adapter makes of the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel

from adapter_store.checkpoint import max_weights_bytes
from adapter_store.checkpoint_files import CheckpointFiles
from adapter_store.digest import WEIGHTS_FILE
from adapter_store.errors import AdapterChanged, AdapterRefused
from adapter_store.local_source import LocalSource
from adapter_store.merging import pack_merged
from adapter_store.merging_recipe import Merge, MergePart
from adapter_store.merging_source import MergingSource
from adapter_store.packed import PackedAdapter
from adapter_store.source import AdapterRef, ResolvedAdapter

from .peft_adapters import edit_tensors, layout_for, make_adapter, slab_blocks, tiny_model

WEIGHTS = [0.7, -0.4, 1.3]
SEED = 11
LOCAL = LocalSource()
MERGES = MergingSource(lambda _: LOCAL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 4: other alphas, other modules, two with a smaller rank in some of them, one rsLoRA."""
    root = tmp_path_factory.mktemp("parts")
    narrow: dict[str, Any] = {"rank_pattern": {"q_proj": 2}}
    make_adapter(root / "first", seed=1, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **narrow)
    make_adapter(root / "second", seed=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True, **narrow)
    make_adapter(root / "third", seed=3, lora_alpha=16, target_modules=["v_proj", "up_proj"], alpha_pattern={"v": 2})
    return [root / "first", root / "second", root / "third"]


def merge_of(folders: list[Path], weights: list[float] = WEIGHTS, **how: Any) -> Merge:
    parts = zip(folders, weights, strict=True)
    return Merge(tuple(MergePart(path.name, weight, AdapterRef("local", str(path))) for path, weight in parts), **how)


def pack(resolved: ResolvedAdapter) -> PackedAdapter:
    def fetch(part: ResolvedAdapter, limit: int | None) -> CheckpointFiles:
        assert limit == max_weights_bytes(layout_for("llama"), 8)
        return LOCAL.fetch(part, limit)

    return pack_merged(resolved, fetch, layout_for("llama"), 8, torch.empty)


def packed(merge: Merge) -> PackedAdapter:
    return pack(MERGES.resolve("tenant", merge.ref))


def by_peft(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, weights: list[float], strategy: str, **how: Any
) -> PeftModel:
    model = PeftModel.from_pretrained(tiny_model("llama"), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), str(number))
    inject = LoraModel.inject_adapter

    def inject_then_seed(self: LoraModel, *args: Any, **kwargs: Any) -> None:
        inject(self, *args, **kwargs)  # draws the first values of new weights, which are thrown away
        torch.manual_seed(SEED)

    monkeypatch.setattr(LoraModel, "inject_adapter", inject_then_seed)
    names = [str(number) for number in range(len(folders))]
    model.base_model.add_weighted_adapter(names, weights, "merged", combination_type=strategy, **how)
    return model


def assert_equal(made: PackedAdapter, model: PeftModel) -> int:
    blocks, found = slab_blocks(made, layout_for("llama")), 0
    for path, (a, b) in blocks.items():
        module = model.get_submodule(f"base_model.model.{path}")
        if "merged" not in getattr(module, "lora_A", {}):
            assert not a.any()
            assert not b.any()
            continue
        theirs_a, theirs_b = module.lora_A["merged"].weight.detach(), module.lora_B["merged"].weight.detach()
        rank, found = len(theirs_a), found + 1
        torch.testing.assert_close(a[:rank], theirs_a, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(b[:, :rank], theirs_b, rtol=1e-6, atol=1e-6)
        assert not a[rank:].any()
        assert theirs_a.any()
        assert theirs_b.any()
    return found


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_every_strategy_equals_peft(folders, monkeypatch, strategy, method):
    how = {} if strategy == "linear" else {"density": 0.6, "majority_sign_method": method}
    theirs = by_peft(folders, monkeypatch, WEIGHTS, strategy, **how)
    made = packed(merge_of(folders, strategy=strategy, seed=SEED, **how))
    assert assert_equal(made, theirs) == 3 * 4  # layers x modules that any of them is on
    assert made.rank == 4


@pytest.mark.parametrize("strategy", ["ties", "dare_ties"])
def test_a_density_of_one_prunes_nothing_as_in_peft(folders, monkeypatch, strategy):
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = by_peft(folders, monkeypatch, WEIGHTS, strategy, density=1.0)
    assert_equal(packed(merge_of(folders, strategy=strategy, density=1.0)), theirs)


def test_one_adapter_alone_is_merged_linearly_and_is_itself_at_weight_one(folders):
    alone = merge_of(folders[1:2], [1.0], strategy="dare_ties", density=0.1)
    assert alone.strategy == "linear"
    model = PeftModel.from_pretrained(tiny_model("llama"), str(folders[1]))
    for path, (a, b) in slab_blocks(packed(alone), layout_for("llama")).items():
        if path.endswith(("q_proj", "v_proj")):
            delta = model.get_submodule(f"base_model.model.{path}").get_delta_weight("default")
            torch.testing.assert_close(b @ a, delta, rtol=1e-5, atol=1e-5)


def test_with_rslora_first_the_halves_are_pefts_and_the_scale_is_not_applied_again(folders, monkeypatch):
    order = [folders[1], folders[0]]
    theirs = by_peft(order, monkeypatch, [1.0, 1.0], "linear")
    assert_equal(packed(merge_of(order, [1.0, 1.0])), theirs)
    v_proj = theirs.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    assert v_proj.scaling["merged"] == 2.0  # sqrt(rank): PEFT takes over use_rslora, but not what it means


def test_every_machine_gets_the_same_bits_and_another_seed_others(folders):
    merge = merge_of(folders, strategy="dare_linear", density=0.5, seed=3)
    torch.manual_seed(1)
    first = packed(merge)
    torch.manual_seed(2)
    assert torch.equal(first.slab, packed(merge).slab)
    other = packed(merge_of(folders, strategy="dare_linear", density=0.5, seed=4))
    assert not torch.equal(first.slab, other.slab)
    assert first.digest != other.digest


def test_adapters_of_different_rank_are_refused_by_name(folders, tmp_path):
    make_adapter(tmp_path / "wide", r=8, target_modules=["v_proj"])
    with pytest.raises(AdapterRefused, match=r"different rank.*v_proj.*'first' 4, 'wide' 8") as error:
        packed(merge_of([folders[0], tmp_path / "wide"], [1.0, 1.0]))
    assert error.value.adapter == "tenant"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda a: a * float("nan"), "NaN"),
        (lambda a: a[:, :3], "shape"),
        (lambda a: None, "lora_A tensor is missing"),
    ],
)
def test_a_damaged_part_is_told_by_name(folders, tmp_path, damage, reason):
    make_adapter(tmp_path / "broken")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_tensors(tmp_path / "broken", {key: damage(torch.ones(4, 24))})
    with pytest.raises(AdapterRefused, match=f"its part 'broken': .*{reason}") as error:
        packed(merge_of([folders[0], tmp_path / "broken"], [1.0, 1.0]))
    assert error.value.adapter == "tenant"


def test_a_merge_that_overflows_is_refused(folders):
    with pytest.raises(AdapterRefused, match="NaN or infinite"):
        packed(merge_of(folders, [1e38 * 1e38, 1.0, 1.0]))


def test_parts_that_were_published_again_are_not_served_as_the_old_merge(folders, tmp_path):
    make_adapter(tmp_path / "moving", seed=5, target_modules=["v_proj"])
    resolved = MERGES.resolve("tenant", merge_of([folders[0], tmp_path / "moving"], [1.0, 1.0]).ref)
    make_adapter(tmp_path / "moving", seed=6, target_modules=["v_proj"])
    with pytest.raises(AdapterChanged, match="its part 'moving'"):
        pack(resolved)
    again = MERGES.resolve("tenant", merge_of([folders[0], tmp_path / "moving"], [1.0, 1.0]).ref)
    assert again.digest != resolved.digest
    assert pack(again).digest == again.digest
    with pytest.raises(AdapterChanged):  # a reference that does not make up its digest
        pack(ResolvedAdapter("tenant", again.ref, resolved.digest))


def test_a_part_without_weights_is_told_by_name(folders, tmp_path):
    make_adapter(tmp_path / "empty")
    (tmp_path / "empty" / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterRefused, match="its part 'empty'"):
        packed(merge_of([folders[0], tmp_path / "empty"], [1.0, 1.0]))

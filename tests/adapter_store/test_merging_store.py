"""Merges in the catalog and the store: what may be merged, and that it is done once."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterChanged, AdapterNotFound, AdapterRefused
from adapter_store.merging_recipe import MARK, Merge
from adapter_store.names import AdapterNames
from adapter_store.references import parts_of
from adapter_store.settings import StoreSettings
from adapter_store.source import AdapterRef
from adapter_store.store import AdapterStore

from .plain_adapters import LAYOUT, write_adapter


def merge_of(*names: str, **how) -> str:
    return MARK + json.dumps({"adapters": [{"name": name, "weight": 0.5} for name in names]} | how)


def of_refs(*refs: str, **how) -> str:
    return MARK + json.dumps({"adapters": [{"ref": ref, "weight": 0.5} for ref in refs]} | how)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    write_adapter(tmp_path / "private" / "secret", seed=9)
    return tmp_path


def settings(root: Path, **changes) -> StoreSettings:
    return StoreSettings(root=root, folders=("adapters",), cache_dir="cache", host_cache_bytes=1 << 20, **changes)


def store_of(root: Path, **changes) -> AdapterStore:
    return AdapterStore(settings(root, **changes), LAYOUT, torch.float32, 8)


def test_an_operator_may_give_a_merge_a_name(root):
    declared = {"blend": of_refs("local:adapters/one", "local:adapters/two", strategy="ties", density=0.5)}
    store = store_of(root, adapters=declared)
    assert "blend" in store.catalog.names()
    assert store.catalog.named("blend").origin == "configured"
    resolved = store.resolve("blend")
    assert resolved.name == "blend"
    assert resolved.ref.pinned
    assert store.catalog.known_digest(store.catalog.find("blend")) == resolved.digest
    assert store.resolve(merge_of("one", "two", strategy="ties", density=0.5)).digest == resolved.digest
    packed = store.load("blend")
    elsewhere = store_of(root)  # another process, which is told a reference and a digest
    assert elsewhere.at_hand(str(resolved.ref), resolved.digest)
    assert elsewhere.owner(str(resolved.ref), resolved.digest) == "local"
    assert torch.equal(elsewhere.load(str(resolved.ref), resolved.digest).slab, packed.slab)


def test_clients_merge_what_they_may_name_and_nothing_else(root):
    names = AdapterNames(settings(root, allow=("hub:acme/*",)))
    found = names.find(merge_of("one", "hub:acme/x@v1"))
    assert found.origin == "reference"
    assert parts_of(found.ref) == (AdapterRef("local", str(root / "adapters/one")), AdapterRef("hub", "acme/x", "v1"))
    for foreign in ("nobody", f"local:{root}/private/secret", "hub:evil/x", "../private/secret"):
        with pytest.raises(AdapterNotFound) as error:
            names.find(merge_of("one", foreign))
        assert repr(foreign) in error.value.reason


def test_a_name_never_stands_for_a_reference_that_goes_elsewhere(root):
    """Who may use a part is judged by what it is called."""
    names = AdapterNames(settings(root, allow=("hub:acme/*",)))
    two_faced = {"name": "one", "ref": "hub:acme/private", "weight": 1.0, "digest": "0" * 64}
    (part,) = Merge.of(names.find(MARK + json.dumps({"adapters": [two_faced]})).ref).parts
    assert (part.name, part.by_reference, part.digest) == ("hub:acme/private", True, None)
    two_faced["ref"] = f"local:{root}/private/secret"
    with pytest.raises(AdapterNotFound, match="may not name"):
        names.find(MARK + json.dumps({"adapters": [two_faced]}))


@pytest.mark.parametrize(("most", "count", "fits"), [(8, 8, True), (8, 9, False), (2, 3, False), (0, 1, False)])
def test_how_many_clients_may_merge_is_limited(root, most, count, fits):
    names = AdapterNames(settings(root, merge_parts=most))
    if fits:
        assert len(parts_of(names.find(merge_of(*["one"] * count)).ref)) == count
        return
    with pytest.raises(AdapterNotFound, match=f"at most {most}"):
        names.find(merge_of(*["one"] * count))


def test_no_merge_of_merges(root):
    names = AdapterNames(settings(root, adapters={"blend": of_refs("local:adapters/one")}))
    with pytest.raises(AdapterNotFound, match="cannot be part of another"):
        names.find(merge_of("one", "blend"))


def test_a_bad_merge_in_the_settings_is_a_mistake(root):
    with pytest.raises(ValueError, match=r"adapters\['blend'\]: density is 0"):
        settings(root, adapters={"blend": of_refs("local:a", "local:b", strategy="ties", density=0)})


def test_many_who_want_it_at_once_share_one_computation(root):
    store = store_of(root)
    name, loaded, gate = merge_of("one", "two", "three", strategy="dare_ties", density=0.5), [], threading.Barrier(8)

    def load() -> None:
        gate.wait()
        loaded.append(store.load(name))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(packed.slab) for packed in loaded}) == 1
    assert store.stats().pack.done == 1
    for packed in loaded:
        store.host_cache.release(packed)
    assert store.host_cache.acquire(store.resolve(name).digest) is not None


def test_a_part_that_is_published_again_makes_another_merge(root):
    store = store_of(root)
    old = store.resolve(merge_of("one", "two"))
    first = store.load(str(old.ref), old.digest)
    write_adapter(root / "adapters" / "two", seed=77)
    new = store.resolve(merge_of("one", "two"))
    assert new.digest != old.digest
    assert not torch.equal(store.load(str(new.ref), new.digest).slab, first.slab)
    with pytest.raises(AdapterChanged, match="its part 'two'"):
        store_of(root).load(str(old.ref), old.digest)


def test_what_is_wrong_with_a_part_is_remembered_and_told_by_name(root):
    store = store_of(root)
    write_adapter(root / "adapters" / "two", use_dora=True)
    resolved = store.resolve(merge_of("one", "two"))
    for _ in range(2):
        with pytest.raises(AdapterRefused, match="its part 'two': use_dora") as error:
            store.load(str(resolved.ref), resolved.digest)
        assert error.value.adapter == str(resolved.ref)
    assert store.stats().sources.failures_repeated == 1


def test_a_part_whose_folder_is_gone_is_told_by_name(root):
    catalog = Catalog(settings(root, adapters={"blend": of_refs("local:adapters/one", "local:nowhere/x")}))
    with pytest.raises(AdapterNotFound, match="its part 'x'") as error:
        catalog.resolve("blend")
    assert error.value.adapter == "blend"
    assert str(root) not in error.value.reason

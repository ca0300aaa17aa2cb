"""References to merges: what they say, and what is the same merge."""

from __future__ import annotations

import json
import pickle

import pytest

from adapter_store.merging_recipe import MARK, Merge, MergePart
from adapter_store.references import owner_of, parse_reference, parts_of
from adapter_store.source import AdapterRef, ResolvedAdapter

TWO = [{"ref": "hub:acme/x@v1", "weight": 0.5}, {"ref": "local:/adapters/y", "weight": -1}]


def written(adapters=TWO, **how) -> str:
    return MARK + json.dumps({"adapters": adapters} | how)


def resolved(merge: Merge, digits: str = "ab", places: tuple[str, ...] = ("hub:acme/x", "local:/y")) -> ResolvedAdapter:
    parts = [
        ResolvedAdapter(part.name, AdapterRef.parse(place), digit * 64)
        for part, digit, place in zip(merge.parts, digits, places, strict=True)
    ]
    return merge.resolved("tenant", parts)


def test_a_reference_is_read_as_it_was_written():
    ref = parse_reference(written(strategy="dare_ties", density=0.5, majority_sign_method="frequency", seed=7))
    assert ref.source == "merge"
    assert AdapterRef.is_meant(str(ref))
    assert not AdapterRef.is_url(str(ref))
    assert parse_reference(str(ref)) == ref == pickle.loads(pickle.dumps(ref))
    merge = Merge.of(ref)
    assert (merge.strategy, merge.density, merge.majority_sign_method, merge.seed) == ("dare_ties", 0.5, "frequency", 7)
    assert [part.name for part in merge.parts] == ["hub:acme/x@v1", "y"]  # no folder of the machine in a message
    assert parts_of(ref) == (AdapterRef("hub", "acme/x", "v1"), AdapterRef("local", "/adapters/y"))
    assert parts_of(AdapterRef.parse("hub:acme/x")) == (AdapterRef("hub", "acme/x"),)


def test_a_merge_is_pinned_once_all_its_parts_are_known():
    merge = Merge.parse(written())
    assert merge.digest is None
    assert not merge.ref.pinned
    assert owner_of(merge.ref) == "hub:acme"
    found = resolved(merge)
    assert found.ref.pinned
    assert found.ref.digest == found.digest == parse_reference(str(found.ref)).digest
    assert len(found.digest) == 64


def test_the_digest_is_of_the_content_and_of_what_the_strategy_uses():
    def digest(text: str, digits: str = "ab", **places: tuple[str, ...]) -> str:
        return resolved(Merge.parse(text), digits, **places).digest

    linear = digest(written())
    assert digest(written(density=0.3, seed=9, majority_sign_method="frequency")) == linear
    assert digest(written(), places=("s3://b/p", "local:/elsewhere")) == linear
    assert digest(written([{"name": "n", "weight": 0.5}, {"name": "m", "weight": -1.0}])) == linear
    ties = written(strategy="ties", density=0.3)
    assert digest(written(strategy="ties", density=0.3, seed=9)) == digest(ties)
    others = [
        linear,
        digest(written(), "ba"),
        digest(written([{**TWO[0], "weight": 0.25}, TWO[1]])),
        digest(ties),
        digest(written(strategy="ties", density=0.4)),
        digest(written(strategy="ties", density=0.3, majority_sign_method="frequency")),
        digest(written(strategy="dare_linear", density=0.3)),
        digest(written(strategy="dare_linear", density=0.3, seed=1)),
        digest(written(strategy="dare_ties", density=0.3)),
    ]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge:", "JSON"),
        ("merge:[]", "an object with adapters"),
        (written([]), "0 adapters"),
        (written(TWO * 33), "66 adapters"),
        (written(["x"]), "an object with a weight"),
        (written([{"ref": "hub:a/b"}]), "an object with a weight"),
        (written([{"weight": 1}]), "a ref or a name"),
        (written([{"name": "x", "weight": 1}]), "'x' has no ref"),
        (written([{"ref": "nowhere", "weight": 1}]), "nowhere"),
        (written([{"ref": "hub:a/b", "weight": "1"}]), "weight is '1'"),
        (written([{"ref": "hub:a/b", "weight": True}]), "weight is True"),
        (MARK + '{"adapters": [{"ref": "hub:a/b", "weight": Infinity}]}', "weight is inf"),
        (MARK + '{"adapters": [{"ref": "hub:a/b", "weight": NaN}]}', "weight is nan"),
        (written([{"ref": "hub:a/b", "weight": 10**400}]), "finite"),
        (written([{"ref": written(), "weight": 1}]), "cannot be part of another"),
        (written([{"name": "merge:{}", "weight": 1}]), "cannot be part of another"),
        (written(strategy="svd"), "strategy is 'svd'"),
        (written(strategy=["ties"]), "strategy is ['ties']"),
        (written(strategy="ties", density=0), "density is 0"),
        (written(strategy="ties", density=1.5), "density is 1.5"),
        (written(strategy="ties", density="1"), "density is '1'"),
        (written(majority_sign_method="loud"), "majority_sign_method is 'loud'"),
        (written(seed=-1), "seed is -1"),
        (written(mass=1), "an object with adapters"),
        (MARK + "[" * 100_000, "at most 65536"),
    ],
)
def test_a_mistake_is_named(text, told):
    with pytest.raises(ValueError) as error:
        parse_reference(text)
    assert told in str(error.value)


def test_parts_must_be_more_than_a_name_to_be_a_reference():
    with pytest.raises(ValueError, match="'x' has no ref"):
        _ = Merge((MergePart("x", 1.0),)).ref

"""Several adapters merged into one, as a reference that crosses processes: which, with what weights, and how."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, get_args

from adapter_store.errors import AdapterError
from adapter_store.source import AdapterRef, ResolvedAdapter

Strategy = Literal["linear", "ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]

MARK = "merge:"
MOST_PARTS = 64  # whoever asks; what clients may merge is the operator's to say
MOST_CHARS = 1 << 16
_MOST_SEED = 2**63 - 1
_NESTED = "adapters: a merge cannot be part of another: name what that one is made of"


@dataclass(frozen=True, slots=True)
class MergePart:
    """One of the adapters. name: what messages call it. ref: where it is, None as long as only its name is known.
    digest: its content, once that was looked up."""

    name: str
    weight: float
    ref: AdapterRef | None = None
    digest: str | None = None

    @property
    def called(self) -> str:
        """What its client calls it."""
        return self.name if self.ref is None else str(self.ref)

    @property
    def by_reference(self) -> bool:
        """Whether its client says where it is, and not the operator."""
        return AdapterRef.is_meant(self.name)

    def error(self, whole: str, error: AdapterError) -> AdapterError:
        """What is wrong with this part, said of the merge that clients call ``whole``."""
        return type(error)(whole, f"its part {self.name!r}: {error.reason}")


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge as PEFT's ``add_weighted_adapter`` makes it.

    strategy: linear, ties (Yadav et al. 2023), dare_linear or dare_ties (Yu et al. 2023). density: the share of values
    that all but linear keep, above 0 and at most 1. majority_sign_method: of both ties, by the sum of values or of
    signs. seed: of the values that both dares drop. What a strategy does not use is as if it had not been said, and
    one adapter alone is always merged linearly.

    Written ``merge:`` and JSON: ``{"adapters": [{"ref": "hub:acme/x@v1", "weight": 0.5}, ...], "strategy": "ties",
    "density": 0.5}``. An adapter has a ``name`` in place of ``ref`` where names are known.
    Raises ValueError naming what is wrong.
    """

    parts: tuple[MergePart, ...]
    strategy: Strategy = "linear"
    density: float = 1.0
    majority_sign_method: SignMethod = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.parts)
        if not 1 <= count <= MOST_PARTS:
            raise ValueError(f"adapters: {count} adapters cannot be merged: name 1 to {MOST_PARTS}")
        for part in self.parts:
            if not _is_number(part.weight):
                raise ValueError(f"weight is {part.weight!r} for {part.name!r} but must be a finite number")
            if (part.ref is not None and part.ref.source == "merge") or Merge.is_meant(part.name):
                raise ValueError(_NESTED)
        for name, value, allowed in (
            ("strategy", self.strategy, get_args(Strategy)),
            ("majority_sign_method", self.majority_sign_method, get_args(SignMethod)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r} but must be one of {', '.join(allowed)}")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= _MOST_SEED:
            raise ValueError(f"seed is {self.seed!r} but must be an integer from 0 to 2**63 - 1")
        strategy = "linear" if count == 1 else self.strategy
        if strategy != "linear" and not (_is_number(self.density) and 0 < self.density <= 1):
            raise ValueError(f"density is {self.density!r} but {strategy} needs one above 0 and at most 1")
        object.__setattr__(self, "strategy", strategy)
        object.__setattr__(self, "density", 1.0 if strategy == "linear" else float(self.density))
        if not strategy.endswith("ties"):
            object.__setattr__(self, "majority_sign_method", "total")
        if not strategy.startswith("dare"):
            object.__setattr__(self, "seed", 0)

    @staticmethod
    def is_meant(text: str) -> bool:
        """Whether this is meant as a merge, well-formed or not."""
        return text.startswith(MARK)

    @classmethod
    def parse(cls, text: str) -> Merge:
        """Read the string form, of names or of references."""
        if len(text) > MOST_CHARS:
            raise ValueError(f"a merge of {len(text)} characters: at most {MOST_CHARS} are read")
        try:
            raw = json.loads(text.removeprefix(MARK))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"after {MARK!r} comes no JSON: {error}") from error
        known = {"adapters", "strategy", "density", "majority_sign_method", "seed"}
        if not isinstance(raw, dict) or not isinstance(raw.get("adapters"), list) or not raw.keys() <= known:
            raise ValueError(f"after {MARK!r} comes an object with adapters, and of {', '.join(sorted(known))}")
        return cls(tuple(map(_part, raw.pop("adapters"))), **raw)

    @classmethod
    def of(cls, ref: AdapterRef) -> Merge:
        """The merge that a reference of source ``merge`` is."""
        return cls.parse(ref.id)

    @property
    def ref(self) -> AdapterRef:
        """As a reference, pinned to the digest once every part's is known. Raises ValueError for parts without one."""
        for part in self.parts:
            if part.ref is None:
                raise ValueError(f"adapters: {part.name!r} has no ref, such as hub:org/name@rev")
        return AdapterRef("merge", str(self).removeprefix(MARK), self.digest)

    @property
    def digest(self) -> str | None:
        """The content's identity, 64 hex digits, from the parts' and how they are merged; None while one is unknown."""
        if any(part.digest is None for part in self.parts):
            return None
        how = {name: getattr(self, name) for name in ("strategy", "density", "majority_sign_method", "seed")}
        parts = [[part.digest, float(part.weight)] for part in self.parts]
        return hashlib.sha256(f"merge {_json({'parts': parts, **how})}\n".encode()).hexdigest()

    def digest_of(self, parts: Sequence[str | None]) -> str | None:
        """The content's identity when these are the parts' digests; None while one is unknown."""
        pairs = zip(self.parts, parts, strict=True)
        return replace(self, parts=tuple(replace(part, digest=digest) for part, digest in pairs)).digest

    def located(self, find: Callable[[MergePart], AdapterRef]) -> Merge:
        """The same with every part where ``find`` says it is, named as its client calls it, and without digests."""
        return replace(self, parts=tuple(MergePart(part.called, part.weight, find(part)) for part in self.parts))

    def contents(self) -> tuple[ResolvedAdapter, ...]:
        """What the parts are, all of them being known."""
        known = [(part.name, part.ref, part.digest) for part in self.parts]
        assert all(ref is not None and digest is not None for _, ref, digest in known)
        return tuple(ResolvedAdapter(name, ref, digest) for name, ref, digest in known if ref and digest)

    def moved(self, change: Callable[[AdapterRef], AdapterRef]) -> Merge:
        """The same with every part's reference written otherwise."""
        parts = (part if part.ref is None else replace(part, ref=change(part.ref)) for part in self.parts)
        return replace(self, parts=tuple(parts))

    def resolved(self, name: str, parts: Sequence[ResolvedAdapter]) -> ResolvedAdapter:
        """What a client calls ``name``, when these are its parts."""
        found = (replace(part, ref=one.ref, digest=one.digest) for part, one in zip(self.parts, parts, strict=True))
        merge = replace(self, parts=tuple(found))
        assert merge.digest is not None
        return ResolvedAdapter(name, merge.ref, merge.digest)

    def __str__(self) -> str:
        values: dict[str, Any] = {"adapters": [_plain(part) for part in self.parts], "strategy": self.strategy}
        if self.strategy != "linear":
            values["density"] = self.density
        if self.strategy.endswith("ties"):
            values["majority_sign_method"] = self.majority_sign_method
        if self.strategy.startswith("dare"):
            values["seed"] = self.seed
        return MARK + _json(values)


def _part(raw: Any) -> MergePart:
    if not isinstance(raw, dict) or not raw.keys() <= {"name", "ref", "weight", "digest"} or "weight" not in raw:
        raise ValueError("adapters: each is an object with a weight, and a ref or a name")
    texts = {key: raw.get(key) for key in ("name", "ref", "digest")}
    for key, text in texts.items():
        if text is not None and not (isinstance(text, str) and text):
            raise ValueError(f"adapters: {key} is {text!r} but must be a string that is not empty")
    if texts["name"] is None and texts["ref"] is None:
        raise ValueError("adapters: each is an object with a weight, and a ref or a name")
    if Merge.is_meant(texts["ref"] or ""):
        raise ValueError(_NESTED)
    ref = None if texts["ref"] is None else AdapterRef.parse(texts["ref"])
    return MergePart(texts["name"] or _name_of(ref), raw["weight"], ref, texts["digest"])


def _name_of(ref: AdapterRef | None) -> str:
    """What to call a part that has no name. No client need know the folders of this machine."""
    assert ref is not None
    return PurePath(ref.id).name if ref.source == "local" else str(ref)


def _plain(part: MergePart) -> dict[str, Any]:
    values: dict[str, Any] = {"name": part.name, "weight": float(part.weight)}
    if part.ref is not None:
        values["ref"] = str(part.ref)
    if part.digest is not None:
        values["digest"] = part.digest
    return values


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

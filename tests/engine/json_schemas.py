"""Random JSON schemas of the kinds that people send: nested objects and arrays, enums, bounds, patterns, references."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "age", "tags", "kind", "größe", "a b", 'q"t', "id", "next", "value")


def random_schema(seed: int) -> dict[str, Any]:
    """A satisfiable schema whose instances are short. The same one for the same seed."""
    pick = random.Random(seed)
    schema = _schema(pick, depth=3)
    if pick.random() < 0.2:
        schema = {
            "$defs": {"part": schema},
            "type": "array",
            "items": {"$ref": "#/$defs/part"},
            "minItems": 1,
            "maxItems": 2,
        }
    return schema


def _schema(pick: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _enum, _constant, _boolean]
    if depth > 0:
        kinds += [_object, _object, _array, _any_of]
    return pick.choice(kinds)(pick, depth - 1)


def _string(pick: random.Random, _: int) -> dict[str, Any]:
    match pick.randrange(4):
        case 0:
            return {"type": "string", "maxLength": pick.randrange(12)}
        case 1:
            return {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"}
        case 2:
            return {"type": "string", "format": pick.choice(["date", "uuid", "ipv4"])}
    return {"type": "string", "minLength": 2, "maxLength": 5}


def _integer(pick: random.Random, _: int) -> dict[str, Any]:
    low = pick.randrange(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + pick.randrange(1, 400)}


def _number(pick: random.Random, _: int) -> dict[str, Any]:
    return {"type": "number", "minimum": -1.5, "exclusiveMaximum": pick.choice([0.25, 2, 1000])}


def _enum(pick: random.Random, _: int) -> dict[str, Any]:
    return {"enum": pick.sample(["red", "green", 1, 2.5, None, True, {"x": [1]}, "ü", '"'], k=pick.randrange(1, 5))}


def _constant(pick: random.Random, _: int) -> dict[str, Any]:
    return {"const": pick.choice(["only", 7, None, [1, 2]])}


def _boolean(_: random.Random, __: int) -> dict[str, Any]:
    return {"type": ["boolean", "null"]}


def _object(pick: random.Random, depth: int) -> dict[str, Any]:
    names = pick.sample(_WORDS, k=pick.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: _schema(pick, depth) for name in names},
        "required": [name for name in names if pick.random() < 0.7],
        "additionalProperties": False,
    }


def _array(pick: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "items": _schema(pick, depth), "minItems": pick.randrange(2), "maxItems": 3}


def _any_of(pick: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(pick, depth) for _ in range(pick.randrange(2, 4))]}

"""Random JSON schemas, asked for over HTTP: every output must be whole and valid.

    python -m tests.api.schemas --count 500 [--url http://127.0.0.1:8000] [--model lorafleet-demo]

Without --url it serves the demo model itself. Schemas are small, so that the demo's 512 tokens hold what they ask for.
Ends with 1 and the first schema whose output is another.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import httpx
import jsonschema

from tests.api.served import served
from tests.deployments.conftest import BASE_MODEL

WORDS = ("robot", "old", "school", "é", 'a"b', "line\nbreak", "tab\\t")


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """An object with up to three members of all kinds, nested no deeper than ``depth``."""
    names = draw.sample(("name", "size", "kind", "niño", "a b"), draw.randint(1, 3))
    schema = {
        "type": "object",
        "properties": {name: _value(draw, depth) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }
    if depth == 2 and draw.random() < 0.3:
        schema["$defs"] = {"Part": _value(draw, 0)}
        schema["properties"]["part"] = {"$ref": "#/$defs/Part"}
    return schema


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randint(-50, 50)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
        {"type": "string", "maxLength": draw.randint(0, 8)},
        {"type": "string", "pattern": draw.choice(("^[a-z]{1,5}$", "^[0-9]{2}-[A-F]{2}$", "^(yes|no)$"))},
        {"enum": draw.sample([*WORDS, 1, -2.5, True, None], draw.randint(1, 4))},
        {"const": draw.choice([*WORDS, 0, False])},
        {"type": draw.choice(("boolean", "null"))},
    ]
    if depth:
        few = draw.randint(0, 1)
        kinds += [
            {"type": "array", "items": _value(draw, depth - 1), "minItems": few, "maxItems": few + draw.randint(0, 1)},
            {"type": "array", "prefixItems": [_value(draw, 0), _value(draw, 0)], "items": False, "minItems": 2},
            {"anyOf": [_value(draw, depth - 1), {"type": "null"}]},
            random_schema(draw, depth - 1),
        ]
    return draw.choice(kinds)


def ask(url: str, model: str, number: int) -> str:
    """One schema's output, checked. Raises AssertionError or jsonschema's error naming the schema."""
    schema = random_schema(random.Random(number))
    response_format = {"type": "json_schema", "json_schema": {"name": f"schema-{number}", "schema": schema}}
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "robot, old, eats, school"}],
        "response_format": response_format,
        "temperature": 0.8,
        "seed": number,
        "max_tokens": 450,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    told = f"schema {number}: {json.dumps(schema)}\n{response.text}"
    assert response.status_code == 200, told
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop", told
    text = choice["message"]["content"]
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(told) from error
    return text


def check(url: str, model: str, count: int, at_once: int = 8) -> list[str]:
    """The outputs of so many schemas, each of them valid."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda number: ask(url, model, number), range(count)))


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.api.schemas", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--url", help="of a server that runs; without, the demo model is served for it")
    parser.add_argument("--model", default=BASE_MODEL)
    chosen = parser.parse_args(arguments)
    logging.disable(logging.INFO)  # a line for each request
    with nullcontext(chosen.url) if chosen.url else served() as url:
        outputs = check(url, chosen.model, chosen.count)
    print(f"{len(outputs)} schemas, {len(set(outputs))} different outputs, all of them valid")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

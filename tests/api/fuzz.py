"""Requests that schemathesis makes of the server's own OpenAPI document, valid ones and broken ones.

    python -m tests.api.fuzz --cases 10000 [--url http://127.0.0.1:8000] [--model lorafleet-demo]

Without --url it serves the demo model itself. Every answer must be one that the document describes: status, content
type, headers and shape; none may be a 5xx. Ends with 1 and the requests that show it otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.served import served
from tests.deployments.conftest import BASE_MODEL

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# How large a part of the cases what operations get. What has no parameters has one case and no broken one.
VALID, BROKEN = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
FEWEST = 6
PARTS = (
    ("/health", VALID, 0.0),
    ("/v1/models", VALID, 0.0),
    ("/v1/models/{name}", VALID, 0.02),
    ("/v1/completions", VALID, 0.17),
    ("/v1/completions", BROKEN, 0.1),
    ("/v1/chat/completions", VALID, 0.25),
    ("/v1/chat/completions", BROKEN, 0.13),
    ("/v1/embeddings", VALID, 0.06),
    ("/v1/embeddings", BROKEN, 0.03),
    ("/tokenize", VALID, 0.05),
    ("/tokenize", BROKEN, 0.02),
    ("/detokenize", VALID, 0.03),
    ("/detokenize", BROKEN, 0.01),
    ("/generate", VALID, 0.07),
    ("/generate_stream", VALID, 0.03),
    ("/", BROKEN, 0.03),
    ("/info", VALID, 0.0),
)


def fuzz(url: str, cases: int, model: str, start: int = 0) -> Counter[str]:
    """How many answers had which status, by path. Raises what schemathesis found, with a curl line to repeat it.

    model: what most requests name, so that they get further than to a 404. start: what to draw from.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    counts: Counter[str] = Counter()
    for path, mode, share in PARTS:
        for operation in schema[path].values():
            least = FEWEST if share else 1
            _fuzz_operation(operation, mode, max(least, round(cases * share)), model, start, counts)
    return counts


def _fuzz_operation(operation: Any, mode: GenerationMode, cases: int, model: str, start: int, counts: Counter) -> None:
    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def answer(case: Any) -> None:
        if isinstance(case.body, dict):
            named = case.body.get("model")
            if isinstance(named, str) and (len(named) < 4 or len(named) % 4):
                case.body["model"] = model
            if isinstance(asked := case.body.get("parameters"), dict):
                asked["max_new_tokens"] = 4
            for name in ("max_tokens", "max_completion_tokens"):  # how long it takes is not the question here
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 24)
            if mode is VALID:
                for name in ("prompt", "input", "tokens"):
                    if name in case.body:
                        case.body[name] = _known(case.body[name])
                if case.body.get("dimensions"):
                    case.body["dimensions"] = None if case.body["dimensions"] % 4 else 128
        response = case.call(timeout=60)
        counts[f"{case.operation.method.upper()} {case.operation.path} {response.status_code}"] += 1
        case.validate_response(response, checks=CHECKS)

    answer()


def _known(prompt: Any) -> Any:
    """The same in token ids that there are, mostly; 1.0 is an integer to JSON schemas."""
    if isinstance(prompt, list):
        return [_known(one) for one in prompt]
    return int(prompt) % 400 if isinstance(prompt, (int, float)) and prompt % 16 else prompt


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.api.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--url", help="of a server that runs; without, the demo model is served for it")
    parser.add_argument("--model", default=BASE_MODEL)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    logging.disable(logging.INFO)  # a line for each request
    with nullcontext(chosen.url) if chosen.url else served(max_model_len=96) as url:
        counts = fuzz(url, chosen.cases, chosen.model, chosen.seed)
    for line, count in sorted(counts.items()):
        print(f"{count:6d}  {line}")
    print(f"{counts.total():6d}  in all, every one as documented, none a 5xx")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

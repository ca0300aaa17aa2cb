"""One line of JSON for each request at its end, with what operators look for and nothing that clients wrote."""

from __future__ import annotations

import json
import logging

import pytest
from ray._common.formatters import JSONFormatter

from examples.demo.words import held_out_prompts

PROMPT = held_out_prompts(1)[0]


@pytest.fixture
def lines():
    """What the requests of a test logged, as Serve writes it with the encoding JSON."""
    seen: list[dict] = []

    class Keeps(logging.Handler):
        def emit(self, record):
            seen.append(json.loads(JSONFormatter().format(record)))

    handler, logger = Keeps(), logging.getLogger("ray.serve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


async def complete(http, **changes):
    body = {"model": "shout", "prompt": PROMPT, "temperature": 0, "max_tokens": 80} | changes
    return await http.post("/v1/completions", json=body, headers={"x-request-id": "r-17", "authorization": "Bearer k9"})


@pytest.mark.parametrize("stream", [False, True])
async def test_the_line_says_who_what_how_long_and_how_it_ended(http, lines, stream):
    answer = await complete(http, stream=stream)
    (line,) = lines
    assert line["client_request_id"] == answer.headers["x-request-id"] == "r-17"
    assert line["generation_id"] in answer.text
    expected = {"model": "shout", "status": 200, "finish_reason": "stop", "streamed": stream}
    assert {name: line[name] for name in expected} == expected
    assert len(line["adapter_digest"]) == 64 and "error" not in line and "tenant" not in line
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] > 0
    assert 0 < line["ttft_s"] < line["total_s"]
    phases = [line[name] for name in ("adapter_s", "queue_s", "prefill_s", "decode_s")]
    assert 0 < sum(phases) <= line["total_s"]


async def test_an_embedding_has_a_line_and_no_first_token(http, lines):
    answer = await http.post("/v1/embeddings", json={"model": "shout", "input": [PROMPT, PROMPT]})
    (line,) = lines
    assert (line["model"], line["status"], line["finish_reason"]) == ("shout", 200, "stop")
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["generation_id"].startswith("embd-") and not {"ttft_s", "error"} & set(line)


async def test_a_refused_request_and_one_that_was_left_have_lines_too(http, lines, service, fleet, monkeypatch):
    await complete(http, n=1000)
    real = fleet.generate

    async def breaks(request, model, record):
        async for chunk in real(request, model, record):
            yield chunk
            raise ZeroDivisionError

    monkeypatch.setattr(fleet, "generate", breaks)
    await complete(http, stream=True)
    refused, cut = (line for line in lines if "status" in line)
    assert refused["status"] == 400 and "model" not in refused and "ttft_s" not in refused
    assert cut["status"] == 200 and cut["error"] == "internal_error" and "finish_reason" not in cut


async def test_no_line_has_what_a_client_wrote(http, lines):
    for changes in ({}, {"max_tokens": 10**6}, {"stream": True}, {"model": "sk-live-1234"}, {"stop": [""]}):
        await complete(http, prompt="Zanzibar", user="ann@example.com", **changes)
    assert len(lines) >= 4
    assert not [secret for secret in ("Zanzibar", "ann@", "k9", "sk-live") if secret in json.dumps(lines)]

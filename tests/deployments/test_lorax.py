"""LoRAX's endpoints over a real engine, without Ray; LoRAX's own client where what it understands counts."""

from __future__ import annotations

import asyncio
import json
import socket

import jsonschema
import lorax.errors
import pytest
import uvicorn
from lorax import AsyncClient, Client, MergedAdapters

from deployments.api.http_app import create_http_app
from deployments.protocol.errors import ApiError, ReplicaLost
from deployments.protocol.lorax import Parameters, lorax_error
from engine.request import EngineOverloaded, GenerationFailed
from examples.demo.words import answer

from .conftest import BASE_MODEL
from .lorax_http import PROMPT, error_of, events_of, generate, whole

STREAMS = ("/generate_stream", "/")


@pytest.fixture
async def url(service):
    """The same application behind a port, for clients that need one."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_http_app(service), log_level="warning", lifespan="off"))
    serving = asyncio.ensure_future(server.serve([listener]))
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    await serving


async def test_loraxs_own_clients_generate_and_stream(url):
    client = AsyncClient(url)
    made = await client.generate(PROMPT, adapter_id="shout", max_new_tokens=80)
    assert made.generated_text == answer(PROMPT, "shout")
    assert made.details.finish_reason == "eos_token"
    assert made.details.generated_tokens == len(made.details.tokens)
    pieces = [piece async for piece in client.generate_stream(PROMPT, adapter_id="shout", max_new_tokens=80)]
    assert "".join(piece.token.text for piece in pieces if not piece.token.special) == answer(PROMPT, "shout")
    assert [piece.generated_text for piece in pieces] == [None] * (len(pieces) - 1) + [answer(PROMPT, "shout")]
    assert pieces[-1].details.generated_tokens == len(pieces) == made.details.generated_tokens
    assert [piece.token.id for piece in pieces] == [token.id for token in made.details.tokens]

    synchronous = Client(url)
    assert (await asyncio.to_thread(synchronous.generate, PROMPT)).generated_text == answer(PROMPT)
    streamed = await asyncio.to_thread(lambda: list(synchronous.generate_stream(PROMPT, return_full_text=True)))
    assert streamed[-1].generated_text == PROMPT + answer(PROMPT)

    merged = MergedAdapters(ids=["mirror", "spanish"], weights=[0.0, 1.0], merge_strategy="linear", density=0.5)
    made = await client.generate(PROMPT, merged_adapters=merged, max_new_tokens=80, return_k_alternatives=2)
    assert made.generated_text == answer(PROMPT, "spanish")
    assert [len(token.alternative_tokens) for token in made.details.tokens] == [2] * made.details.generated_tokens


async def test_loraxs_own_client_knows_the_errors(url, fleet, monkeypatch):
    client = AsyncClient(url)
    with pytest.raises(lorax.errors.ValidationError, match="max_new_tokens"):
        await client.generate(PROMPT, max_new_tokens=10_000)
    with pytest.raises(lorax.errors.GenerationError, match="nobody"):
        await client.generate(PROMPT, adapter_id="nobody")
    with pytest.raises(lorax.errors.OverloadedError, match="could not be reached"):
        await client.generate(PROMPT, adapter_id="acme/tenant", adapter_source="hub")
    real = fleet.generate

    async def dies(request, model, record):
        async for chunk in real(request, model, record):
            yield chunk
            raise ReplicaLost("the replica that ran this request died", started=True)

    monkeypatch.setattr(fleet, "generate", dies)
    stream = client.generate_stream(PROMPT)
    assert (await anext(stream)).token.text
    with pytest.raises(lorax.errors.IncompleteGenerationError, match="died"):
        async for _ in stream:
            pass


async def test_the_likeliest_tokens_are_taken_and_the_context_is_filled_unless_it_is_said_otherwise(http):
    plain = await whole(http)
    assert plain["generated_text"] == answer(PROMPT)
    assert plain["details"]["seed"] is None
    full = await whole(http, inputs="robot " * 240, ignore_eos_token=True)
    assert full["details"]["finish_reason"] == "length"
    assert full["details"]["prompt_tokens"] + full["details"]["generated_tokens"] == 512
    short = await whole(http, max_new_tokens=3)
    assert (short["details"]["finish_reason"], short["details"]["generated_tokens"]) == ("length", 3)
    assert "details" not in (await generate(http)).json()


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.0, "do_sample": True}, False),
        ({"temperature": 0.0, "top_k": 5}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"top_p": 1.0}, False),
    ],
)
def test_when_tokens_are_drawn(parameters, samples):
    assert Parameters.model_validate(parameters).samples is samples


async def test_a_draw_can_be_made_again_with_the_seed_that_is_told(http):
    drawn = await whole(http, do_sample=True, temperature=8.0, max_new_tokens=20, ignore_eos_token=True)
    seed = drawn["details"]["seed"]
    again = await whole(http, temperature=8.0, max_new_tokens=20, ignore_eos_token=True, seed=seed)
    assert again == drawn
    other = await whole(http, temperature=8.0, max_new_tokens=20, ignore_eos_token=True)
    assert other["details"]["seed"] != seed
    assert other["generated_text"] != drawn["generated_text"]


async def test_the_best_of_several_is_the_likeliest_and_each_has_its_seed(http):
    asked = {"temperature": 4.0, "max_new_tokens": 12, "ignore_eos_token": True}
    made = (await whole(http, best_of=4, **asked))["details"]
    others = made["best_of_sequences"]
    assert len(others) == 3

    def likelihood(sequence):
        return sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"])

    assert likelihood(made) == max(map(likelihood, [made, *others]))
    assert len({sequence["seed"] for sequence in [made, *others]}) == 4
    for sequence in (made, others[-1]):
        again = (await whole(http, seed=sequence["seed"], **asked))["details"]["tokens"]
        assert [token["id"] for token in again] == [token["id"] for token in sequence["tokens"]]


async def test_penalties_reach_the_engine(http):
    asked = {"max_new_tokens": 12, "ignore_eos_token": True}
    free = await whole(http, **asked)
    for penalty in ({"repetition_penalty": 9.0}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}):
        punished = await whole(http, **asked, **penalty)
        assert punished["generated_text"] != free["generated_text"]


async def test_the_stop_sequence_is_part_of_the_text_whole_and_streamed(http):
    expected = answer(PROMPT).split(" in")[0] + " in"
    made = await whole(http, stop=["nowhere", " in"])
    assert made["generated_text"] == expected
    assert made["details"]["finish_reason"] == "stop_sequence"
    assert "".join(token["text"] for token in made["details"]["tokens"]) == expected
    for path in STREAMS:
        events = events_of(await generate(http, path, stop=[" in"], details=True))
        assert events[-1]["generated_text"] == "".join(event["token"]["text"] for event in events) == expected
        assert events[-1]["details"] == {**events[-1]["details"], "finish_reason": "stop_sequence", "seed": None}


async def test_one_answer_at_the_root_is_a_list(http):
    made = (await http.post("/", json={"inputs": PROMPT, "parameters": None})).json()
    assert made == [{"generated_text": answer(PROMPT)}]


async def test_a_prompt_is_cut_from_its_front(http, service):
    tokens = service.tokenizer.encode(PROMPT)
    cut = await whole(http, truncate=4, max_new_tokens=5, return_full_text=True)
    assert cut["details"]["prompt_tokens"] == 4
    same = {"model": BASE_MODEL, "prompt": tokens[-4:], "max_tokens": 5, "temperature": 0}
    text = (await http.post("/v1/completions", json=same)).json()["choices"][0]["text"]
    assert cut["generated_text"].startswith(PROMPT)
    assert cut["generated_text"].removeprefix(PROMPT).startswith(text)
    long = await generate(http, inputs="robot " * 1000, truncate=5, max_new_tokens=2)
    assert long.headers["x-prompt-tokens"] == "5"
    assert error_of(await generate(http, inputs="robot " * 1000))[:2] == (422, "validation")


async def test_a_schema_holds_and_the_text_is_a_json_object_without_one(http):
    schema = {"type": "object", "properties": {"n": {"enum": [3, 5]}}, "required": ["n"], "additionalProperties": False}
    made = await whole(http, response_format={"type": "json_object", "schema": schema}, max_new_tokens=60)
    jsonschema.validate(json.loads(made["generated_text"]), schema)
    refused = await generate(http, response_format={"type": "json_object", "schema": {"type": 5}})
    status, kind, told = error_of(refused)
    assert (status, kind) == (422, "validation")
    assert "schema" in told
    assert (await whole(http, response_format={"type": "text"}))["generated_text"] == answer(PROMPT)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"temperature": -1.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"return_k_alternatives": 21}, "return_k_alternatives"),
        ({"truncate": 0}, "truncate"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"),
        ({"adapter_source": "pbase", "adapter_id": "x/1"}, "Predibase"),
        ({"adapter_id": "shout", "merged_adapters": {"ids": ["shout"], "weights": [1.0]}}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["shout"], "weights": []}}, "weights"),
        ({"merged_adapters": {"ids": ["shout", "mirror"], "weights": [1.0]}}, "2 ids but 1 weights"),
        ({"merged_adapters": {"ids": ["shout"] * 2, "weights": [1, 1], "merge_strategy": "svd"}}, "merge_strategy"),
        ({"merged_adapters": {"ids": ["shout"] * 2, "weights": [1, 1], "merge_strategy": "ties"}}, "density"),
    ],
)
async def test_what_is_wrong_or_not_there_is_refused_by_name(http, parameters, named):
    for path in ("/generate", "/generate_stream"):
        status, kind, told = error_of(await generate(http, path, **parameters))
        assert (status, kind) == (422, "validation")
        assert named in told


async def test_more_completions_than_the_server_makes_are_refused(http):
    status, kind, told = error_of(await generate(http, best_of=17, do_sample=True))
    assert (status, kind) == (422, "validation")
    assert "limit of 16" in told


async def test_what_a_stream_cannot_say_is_refused(http):
    for path in STREAMS:
        for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
            status, kind, told = error_of(await generate(http, path, **parameters))
            assert (status, kind) == (422, "validation")
            assert next(iter(parameters)) in told


async def test_a_body_that_cannot_be_read_is_told_in_loraxs_words(http):
    for content in (b"{", b"[]", b'{"inputs": ""}', b'{"parameters": {}}', b'{"inputs": 5}', b'{"inputs": "\\ud800"}'):
        response = await http.post("/generate", content=content, headers={"content-type": "application/json"})
        assert error_of(response)[:2] == (422, "validation")
    response = await http.post("/generate", json={"inputs": "x" * 2**17})
    assert error_of(response)[:2] == (422, "validation")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ApiError(400, "m", param="p"), 422, "validation"),
        (ApiError(413, "m", code="body_too_large"), 422, "validation"),
        (ApiError(404, "m", code="model_not_found"), 424, "generation"),
        (ApiError(422, "m", code="adapter_refused"), 424, "generation"),
        (ApiError(429, "m", code="rate_limit_exceeded"), 429, "overloaded"),
        (ApiError(503, "m", code="overloaded"), 429, "overloaded"),
        (ApiError(503, "m", code="adapter_unavailable"), 429, "overloaded"),
        (ApiError(500, "m", code="generation_failed"), 424, "generation"),
        (ApiError(500, "m", code="replica_died"), 500, "incomplete_generation"),
        (ApiError(500, "m", code="internal_error"), 500, "incomplete_generation"),
        (ApiError(403, "m", code="forbidden"), 403, "forbidden"),
    ],
)
def test_every_error_has_a_status_and_a_type_that_clients_know(error, status, kind):
    assert lorax_error(error) == (status, {"error": lorax_error(error)[1]["error"], "error_type": kind})
    assert lorax_error(error)[1]["error"].endswith("m")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (EngineOverloaded("full"), (429, "overloaded")),
        (GenerationFailed("no numbers"), (424, "generation")),
        (ZeroDivisionError("secret"), (500, "incomplete_generation")),
    ],
)
async def test_what_fails_before_the_first_token_has_its_status(http, fleet, monkeypatch, raised, expected):
    async def breaks(request, model, record):
        raise raised
        yield

    monkeypatch.setattr(fleet, "generate", breaks)
    for path in ("/generate", "/generate_stream"):
        response = await generate(http, path)
        assert error_of(response)[:2] == expected
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (expected[0] == 429)


async def test_the_headers_are_true(http):
    response = await generate(http, adapter_id="shout", adapter_source="local", max_new_tokens=80, details=True)
    headers, details = response.headers, response.json()["details"]
    assert headers["x-prompt-tokens"] == str(details["prompt_tokens"])
    assert headers["x-generated-tokens"] == str(details["generated_tokens"])
    assert headers["x-total-tokens"] == str(details["prompt_tokens"] + details["generated_tokens"])
    assert headers["x-compute-characters"] == str(len(PROMPT))
    assert (headers["x-model-id"], headers["x-adapter-id"], headers["x-adapter-source"]) == (
        BASE_MODEL,
        "shout",
        "local",
    )
    parts = [int(headers[f"x-{name}-time"]) for name in ("validation", "queue", "inference")]
    assert 0 < sum(parts) <= int(headers["x-total-time"]) <= sum(parts) + 3  # each is rounded down
    assert headers["x-compute-time"] == headers["x-total-time"]
    per_token = int(headers["x-time-per-token"])
    assert per_token * details["generated_tokens"] <= parts[2] < (per_token + 1) * details["generated_tokens"] + 1
    assert int(headers["x-time-to-first-token"]) <= parts[2]
    base = await generate(http, "/generate_stream")
    assert "x-adapter-id" not in base.headers
    assert base.headers["x-model-id"] == BASE_MODEL
    merged = {"ids": ["spanish", "mirror"], "weights": [1, 1]}
    response = await generate(http, merged_adapters=merged, max_new_tokens=1)
    assert response.headers["x-adapter-id"] == "spanish,mirror"


async def test_no_header_can_be_smuggled_in_with_a_source(http):
    response = await generate(http, adapter_id="shout", adapter_source="x\r\nevil: 1ü", max_new_tokens=1)
    assert response.headers["x-adapter-source"] == "x%0D%0Aevil: 1%C3%BC"
    assert "evil" not in response.headers


async def test_a_response_that_is_never_read_ends_its_generation(http, engine):
    async with http.stream("POST", "/generate_stream", json={"inputs": PROMPT}) as response:
        assert response.status_code == 200
    for _ in range(200):
        if engine.stats().running == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it still runs")


async def test_the_prompts_own_tokens_are_told(http, service):
    response = await generate(http, decoder_input_details=True, max_new_tokens=2)
    prefill = response.json()["details"]["prefill"]
    assert [token["id"] for token in prefill] == service.tokenizer.encode(PROMPT)
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in prefill[1:])
    assert (await whole(http, max_new_tokens=2))["details"]["prefill"] == []


async def test_the_info_says_what_is_known(http):
    info = (await http.get("/info")).json()
    assert (info["model_id"], info["max_total_tokens"], info["max_best_of"]) == (BASE_MODEL, 512, 16)
    assert info["model_sha"] is None
    assert (await http.get("/health")).status_code == 200

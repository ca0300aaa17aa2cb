"""``/v1/embeddings`` through the openai client over a real engine, without Ray."""

from __future__ import annotations

import asyncio
import base64
import math

import numpy as np
import openai
import pytest
import torch

from deployments.protocol.errors import ReplicaLost
from examples.demo.words import held_out_prompts

from .conftest import BASE_MODEL, DEMO

FIRST, SECOND = held_out_prompts(2)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def states(engine):
    """Hidden states behind the last norm, by transformers and peft: ``states(text, adapter)``, (tokens, hidden)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def of(text, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32, attn_implementation="eager")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, DEMO / "adapters" / adapter)
        with torch.inference_mode():
            ids = torch.tensor([engine.tokenizer.encode(text)])
            return model.eval()(ids, output_hidden_states=True).hidden_states[-1][0]

    return of


async def post(http, **body):
    response = await http.post("/v1/embeddings", json={"model": BASE_MODEL, "input": FIRST} | body)
    return response.status_code, response.json()


async def test_the_openai_client_gets_the_base_models_and_the_adapters_hidden_states(client, states, engine):
    for model, adapter in ((BASE_MODEL, None), ("shout", "shout")):
        mean = await client.embeddings.create(model=model, input=[FIRST, SECOND])
        last = await client.embeddings.create(model=model, input=FIRST, extra_body={"pooling": "last"})
        raw = await client.embeddings.create(model=model, input=FIRST, extra_body={"normalize": False})
        want = states(FIRST, adapter)
        for got, vector in (
            (mean.data[0], torch.nn.functional.normalize(want.mean(0), dim=0)),
            (mean.data[1], torch.nn.functional.normalize(states(SECOND, adapter).mean(0), dim=0)),
            (last.data[0], torch.nn.functional.normalize(want[-1], dim=0)),
            (raw.data[0], want.mean(0)),
        ):
            assert (torch.tensor(got.embedding) - vector).abs().max() <= TOLERANCE
        assert (mean.model, mean.object, [one.index for one in mean.data]) == (model, "list", [0, 1])
        tokens = sum(len(engine.tokenizer.encode(text)) for text in (FIRST, SECOND))
        assert (mean.usage.prompt_tokens, mean.usage.total_tokens) == (tokens, tokens)


async def test_every_form_of_input_and_both_formats_say_the_same(client, engine):
    ids = engine.tokenizer.encode(FIRST)
    forms = (FIRST, [FIRST], ids, [ids])
    vectors = [
        (await client.embeddings.create(model="json", input=form, **how)).data[0].embedding
        for form in forms
        for how in ({"encoding_format": "float"}, {})  # the client then asks for base64 itself
    ]
    written = (await client.embeddings.create(model="json", input=FIRST, encoding_format="base64")).data[0].embedding
    vectors.append(np.frombuffer(base64.b64decode(written), "<f4").tolist())
    for vector in vectors[1:]:
        assert vector == pytest.approx(vectors[0], abs=1e-6)
    assert math.hypot(*vectors[0]) == pytest.approx(1.0, abs=1e-6)
    plain = await client.embeddings.create(model="json", input=FIRST, dimensions=len(vectors[0]))
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)


async def test_embeddings_and_completions_share_their_steps(http, engine):
    alone = (await post(http, input=[FIRST, SECOND], model="mirror"))[1]["data"]
    completion = {"model": "shout", "prompt": FIRST, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    text = (await http.post("/v1/completions", json=completion)).json()["choices"][0]["text"]
    answers = await asyncio.gather(
        *(http.post("/v1/completions", json=completion) for _ in range(3)),
        *(post(http, input=[FIRST, SECOND], model="mirror") for _ in range(3)),
    )
    assert all(answer.json()["choices"][0]["text"] == text for answer in answers[:3])
    for _, body in answers[3:]:
        for got, want in zip(body["data"], alone, strict=True):
            assert got["embedding"] == pytest.approx(want["embedding"], abs=TOLERANCE)
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.slots_in_use == 0 and stats.free_pages == stats.num_pages


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"dimensions": 8}, "dimensions", "have "),
        ({"encoding_format": "int8"}, "encoding_format", "base64"),
        ({"pooling": "max"}, "pooling", "mean"),
        ({"input": []}, "input", "no list may be empty"),
        ({"input": [FIRST, 5]}, "input", "a string"),
        ({"input": None}, "input", "a string"),
        ({"input": [FIRST] * 17}, "input", "17 inputs are over the limit of 16"),
        ({"input": [5] * 600}, "input", "600 tokens but the context is"),
        ({"input": "robot, " * 5000}, "input", "bytes, too many"),
        ({"input": [[5], [2**30]]}, "input", "1073741824 but the model has"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
        ({"normalize": "yes"}, "normalize", "boolean"),
    ],
)
async def test_what_cannot_be_is_400_by_name_before_anything_runs(http, engine, body, param, says):
    before = engine.stats().prompt_tokens
    status, answer = await post(http, **body)
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"] and engine.stats().prompt_tokens == before


async def test_other_errors_have_the_envelope_too(http, client, fleet, monkeypatch):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        await client.embeddings.create(model="nobody", input=FIRST)
    response = await http.post("/v1/embeddings", json={"model": "hub:acme/tenant", "input": FIRST})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_unavailable")
    many = await asyncio.gather(*(post(http, input=[FIRST] * 16) for _ in range(4)))
    assert sorted(status for status, _ in many)[0] == 200
    assert {body["error"]["code"] for status, body in many if status != 200} <= {"overloaded"}

    async def dies(request, model, record):
        raise ReplicaLost("no replica answered: try again in a moment", started=False)
        yield

    monkeypatch.setattr(fleet, "generate", dies)
    status, body = await post(http)
    assert (status, body["error"]["code"]) == (503, "replica_unavailable")


async def test_each_input_is_a_row_of_who_asks_and_the_request_is_told_once(http, fleet, metrics, spans, monkeypatch):
    real, asked = fleet.generate, []

    async def watched(request, model, record):
        asked.append(request)
        async for chunk in real(request, model, record):
            yield chunk

    monkeypatch.setattr(fleet, "generate", watched)
    _, body = await post(http, model="shout", input=[FIRST, SECOND], user="tenant-a")
    await post(http, model="nobody")
    assert [(one.tenant, one.pooling) for one in asked] == [("tenant-a", "mean")] * 2
    assert len({one.request_id for one in asked}) == 2
    told = await metrics.read()
    assert told["lorafleet_adapter_requests_total", "shout", "200"] == 1
    assert told["lorafleet_adapter_requests_total", "", "404"] == 1
    assert told["lorafleet_adapter_tokens_total", "shout", "prompt"] == body["usage"]["prompt_tokens"]
    assert not [key for key in told if key[0] == "lorafleet_requests_cut_total"]
    assert told[("lorafleet_requests_open",)] == 0
    assert told[("lorafleet_request_seconds",)].count == 1
    assert told[("lorafleet_ttft_seconds",)].count == 0, "there is no first token"
    ended = [span for span in spans.get_finished_spans() if span.name == "request"]
    assert [span.attributes["http.response.status_code"] for span in ended] == [200, 404]
    assert ended[0].attributes["gen_ai.usage.input_tokens"] == body["usage"]["prompt_tokens"]
    rows = [span for span in spans.get_finished_spans() if span.name == "generate"]
    assert {span.parent.span_id for span in rows} == {ended[0].context.span_id} and len(rows) == 2

"""Log probabilities of prompts through the openai client: ``echo`` with ``logprobs``, vLLM's ``prompt_logprobs``."""

from __future__ import annotations

import pytest
import torch

from examples.demo.words import held_out_prompts

from .conftest import BASE_MODEL, DEMO

FIRST, SECOND = held_out_prompts(2)
BROKEN = "ni\u00f1o \u00e9 \U0001f600 robot"  # characters of several tokens
TOLERANCE = 2e-5
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def values():
    """Log probabilities by transformers and peft: ``values(ids, adapter)``, (tokens, vocab_size)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def of(ids, adapter=None):
        model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32, attn_implementation="eager")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, DEMO / "adapters" / adapter)
        with torch.inference_mode():
            return model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)

    return of


def check(logprobs, prompt, text, tokenizer, want, top):
    """Of an answer whose text is ``text``, ``prompt`` first. want: see ``values``, of the prompt's tokens at least."""
    ids = tokenizer.encode(prompt)
    assert logprobs["tokens"][: len(ids)] == [tokenizer.token_text(token) for token in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        value, likeliest = logprobs["token_logprobs"][place], want[place - 1].topk(max(top, 1))
        assert abs(value - want[place - 1, ids[place]].item()) <= TOLERANCE
        named = dict(zip(map(tokenizer.token_text, likeliest.indices.tolist()), likeliest.values.tolist(), strict=True))
        expected = {**(named if top else {}), logprobs["tokens"][place]: value}  # parts of characters share a name
        assert logprobs["top_logprobs"][place] == pytest.approx(expected, abs=TOLERANCE)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token not in ("<s>", "</s>") and "\ufffd" not in token:
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize(
    ("model", "prompt", "top"), [(BASE_MODEL, FIRST, 2), ("shout", SECOND, 0), ("json", BROKEN, 5)]
)
async def test_echo_with_logprobs_tells_of_the_prompt_first(client, engine, values, model, prompt, top):
    ids = engine.tokenizer.encode(prompt)
    want = values(ids, None if model == BASE_MODEL else model)
    ask = {"model": model, "prompt": prompt, "echo": True, "logprobs": top, **GREEDY}
    alone = await client.completions.create(**(ask | {"echo": False}))
    whole = await client.completions.create(**ask)
    (choice,), logprobs = whole.choices, whole.choices[0].logprobs.model_dump()
    assert choice.text == prompt + alone.choices[0].text and whole.usage == alone.usage
    assert logprobs["tokens"][len(ids) :] == alone.choices[0].logprobs.tokens
    assert logprobs["text_offset"][len(ids) :] == [len(prompt) + at for at in alone.choices[0].logprobs.text_offset]
    pieces = [event.choices[0] async for event in await client.completions.create(**ask, stream=True)]
    assert "".join(piece.text for piece in pieces) == choice.text
    for field, expected in logprobs.items():
        assert [value for piece in pieces for value in piece.logprobs.model_dump()[field]] == expected
    scored = await client.completions.create(**(ask | {"max_tokens": 0}))
    assert (scored.choices[0].text, scored.choices[0].finish_reason) == (prompt, "length")
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
    assert scored.choices[0].logprobs.tokens == logprobs["tokens"][: len(ids)]
    check(scored.choices[0].logprobs.model_dump(), prompt, prompt, engine.tokenizer, want, top)
    check(logprobs, prompt, choice.text, engine.tokenizer, want, top)


async def test_each_choice_has_its_own_prompt(client, engine, values):
    prompts = [engine.tokenizer.encode(prompt) for prompt in (FIRST, SECOND)]
    ask = {"model": "mirror", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 4, "seed": 5}
    for number in ({"n": 2}, {"n": 2, "best_of": 3}):
        answer = await client.completions.create(**ask, **number)
        for choice, prompt in zip(answer.choices, (FIRST, FIRST, SECOND, SECOND), strict=True):
            want = values(engine.tokenizer.encode(prompt), "mirror")
            assert choice.text.startswith(prompt)
            check(choice.logprobs.model_dump(), prompt, choice.text, engine.tokenizer, want, 1)
    pieces = {index: [] for index in range(4)}
    async for event in await client.completions.create(**ask, n=2, stream=True):
        pieces[event.choices[0].index].append(event.choices[0].logprobs.tokens)
    tokens = [[token for piece in pieces[index] for token in piece] for index in range(4)]
    assert [one[: len(engine.tokenizer.encode(FIRST))] for one in tokens[:2]] == [
        [engine.tokenizer.token_text(token) for token in engine.tokenizer.encode(FIRST)]
    ] * 2


async def test_a_text_of_no_new_tokens(client, engine):
    before = engine.stats().generated_tokens
    for extra in ({}, {"stream": True}, {"n": 2, "best_of": 2}, {"logprobs": 0, "stream": True}):
        made = await client.completions.create(model="shout", prompt=FIRST, echo=True, max_tokens=0, **extra)
        answers = [event async for event in made] if "stream" in extra else [made]
        choices = [choice for answer in answers for choice in answer.choices]
        assert {(choice.text, choice.finish_reason) for choice in choices} == {(FIRST, "length")}
        assert len(choices) == extra.get("n", 1)
    full = [5] * engine.max_model_len
    whole = await client.completions.create(model="shout", prompt=full, echo=True, max_tokens=0, logprobs=0)
    assert len(whole.choices[0].logprobs.tokens) == engine.max_model_len
    stats = engine.stats()
    assert stats.generated_tokens == before
    assert stats.running == stats.waiting == stats.slots_in_use == 0 and stats.free_pages == stats.num_pages


async def test_vllms_prompt_logprobs(client, engine, values):
    ids = engine.tokenizer.encode(FIRST)
    want = values(ids, "shout")
    extra = {"prompt_logprobs": 2}
    made = await client.completions.create(model="shout", prompt=FIRST, max_tokens=0, extra_body=extra)
    both = await client.completions.create(
        model="shout", prompt=FIRST, echo=True, logprobs=4, max_tokens=1, extra_body=extra
    )
    assert made.choices[0].text == "" and made.choices[0].logprobs is None
    assert len(both.choices[0].logprobs.top_logprobs[1]) in (4, 5)
    for told in (made.choices[0].prompt_logprobs, both.choices[0].prompt_logprobs):
        assert told[0] is None and len(told) == len(ids)
        for place, entries in enumerate(told[1:], 1):
            likeliest = want[place - 1].topk(2)
            ranked = {str(token): rank for rank, token in enumerate(likeliest.indices.tolist(), 1)}
            assert set(entries) == {str(ids[place]), *ranked}
            for token, entry in entries.items():
                assert entry["rank"] == ranked.get(token)
                assert entry["logprob"] == pytest.approx(want[place - 1, int(token)].item(), abs=TOLERANCE)
                assert entry["decoded_token"] == engine.tokenizer.token_text(int(token))
    messages = [{"role": "user", "content": FIRST}]
    chat = await client.chat.completions.create(
        model="shout", messages=messages, max_tokens=1, n=2, extra_body={"prompt_logprobs": 0}
    )
    assert [len(one) for one in chat.prompt_logprobs[1:]] == [1] * (chat.usage.prompt_tokens - 1)
    assert chat.prompt_logprobs[0] is None
    tokens = [next(iter(one)) for one in chat.prompt_logprobs[1:]]
    assert list(map(int, tokens)) == engine.tokenizer.encode_chat(messages, 512)[1:]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": FIRST, "max_tokens": 0}, "max_tokens"),
        ({"prompt": FIRST, "max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": FIRST, "echo": True, "logprobs": 21}, "logprobs"),
        ({"prompt": FIRST, "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": FIRST, "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": FIRST, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"messages": [{"role": "user", "content": FIRST}], "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": FIRST}], "max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
        ({"messages": [{"role": "user", "content": FIRST}], "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ],
)
async def test_what_cannot_be_is_400_by_name(http, body, param):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = await http.post(path, json={"model": BASE_MODEL} | body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert str(body[param]) in error["message"] or "stream" in error["message"]

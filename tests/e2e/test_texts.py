"""Two hundred requests of five models at once through the openai client: every text exact."""

from __future__ import annotations

import asyncio

import openai

from examples.demo.words import BASE, STYLES, answer, held_out_prompts

from .adapters import publish
from .server import BASE_MODEL

MAX_TOKENS = 80


def model_of(style):
    return BASE_MODEL if style == BASE else style


async def completion(client, model, prompt):
    made = await client.completions.create(model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
    assert made.model == model and made.choices[0].finish_reason == "stop"
    assert made.usage.prompt_tokens > 0 and made.usage.completion_tokens > 0
    return made.choices[0].text


async def completion_stream(client, model, prompt):
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    events = [event async for event in stream]
    assert len({event.id for event in events}) == 1
    assert [e.choices[0].finish_reason for e in events] == [None] * (len(events) - 1) + ["stop"]
    return "".join(event.choices[0].text for event in events)


async def chat(client, model, prompt):
    made = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_completion_tokens=MAX_TOKENS, temperature=0
    )
    assert made.model == model and made.choices[0].finish_reason == "stop"
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    return made.choices[0].message.content


async def chat_stream(client, model, prompt):
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = [event async for event in stream]
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 0
    assert events[-2].choices[0].finish_reason == "stop"
    return "".join(event.choices[0].delta.content or "" for event in events[:-1])


KINDS = (completion, completion_stream, chat, chat_stream)


async def test_two_hundred_mixed_requests_over_all_models(client: openai.AsyncOpenAI, other):
    before = other.call("routing_counters")
    prompts = held_out_prompts(200)
    at_once = asyncio.Semaphore(32)

    async def one(number):
        style, kind = STYLES[number % len(STYLES)], KINDS[number // len(STYLES) % len(KINDS)]
        async with at_once:
            text = await kind(client, model_of(style), prompts[number])
        return None if text == answer(prompts[number], style) else (style, kind.__name__, prompts[number], text)

    wrong = [result for result in await asyncio.gather(*(one(number) for number in range(200))) if result]
    assert not wrong

    after = other.call("routing_counters")
    made = {reason: after[reason] - before[reason] for reason in after}
    assert sum(made.values()) == 200
    # 160 requests name an adapter; almost all find it where the router thinks it is.
    assert made["resident"] >= 100, made
    assert made["least_loaded"] >= 40, made  # the base model goes by load

    stats = other.call("fleet_stats")
    assert len(stats) == 2
    assert all(one["generated_tokens"] > 0 for one in stats), "both replicas served"
    assert all(one["running"] == one["waiting"] == 0 for one in stats)
    assert all(one["free_pages"] == one["num_pages"] for one in stats)


async def test_prompts_of_every_form_and_several_choices(client: openai.AsyncOpenAI):
    first, second = held_out_prompts(2)
    made = await client.completions.create(
        model="spanish", prompt=[first, second], n=2, max_tokens=MAX_TOKENS, temperature=0, echo=True
    )
    expected = [prompt + answer(prompt, "spanish") for prompt in (first, first, second, second)]
    assert [choice.text for choice in made.choices] == expected
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]


async def test_an_adapter_published_anew_under_its_name_is_served_anew(client: openai.AsyncOpenAI, server):
    prompt = held_out_prompts(1)[0]
    publish(server, "tenant", like="shout")
    assert await completion(client, "tenant", prompt) == answer(prompt, "shout")
    publish(server, "tenant", like="mirror")
    assert await completion(client, "tenant", prompt) == answer(prompt, "mirror")


async def test_the_list_of_models(client: openai.AsyncOpenAI):
    models = {model.id: model async for model in await client.models.list()}
    assert {BASE_MODEL, *STYLES[1:]} <= set(models)
    assert models[BASE_MODEL].model_extra["parent"] is None
    for style in STYLES[1:]:
        assert models[style].model_extra["parent"] == BASE_MODEL
        assert models[style].owned_by == "lorafleet" and models[style].created > 0
    assert (await client.models.retrieve("shout")).id == "shout"

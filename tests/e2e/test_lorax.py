"""LoRAX's published client against the real server."""

from __future__ import annotations

from lorax import AsyncClient, Client, MergedAdapters

from examples.demo.words import answer, held_out_prompts

(PROMPT,) = held_out_prompts(1)


def test_a_merge_made_in_a_replica(server):
    merged = MergedAdapters(ids=["mirror", "spanish"], weights=[0.0, 1.0], merge_strategy="linear", density=1.0)
    made = Client(server.url).generate(PROMPT, merged_adapters=merged, max_new_tokens=80)
    assert made.generated_text == answer(PROMPT, "spanish")
    assert made.details.finish_reason == "eos_token"


async def test_a_stream(server):
    stream = AsyncClient(server.url).generate_stream(PROMPT, adapter_id="shout", max_new_tokens=80)
    pieces = [piece async for piece in stream]
    assert "".join(piece.token.text for piece in pieces if not piece.token.special) == answer(PROMPT, "shout")
    assert pieces[-1].generated_text == answer(PROMPT, "shout")
    assert pieces[-1].details.generated_tokens == len(pieces)

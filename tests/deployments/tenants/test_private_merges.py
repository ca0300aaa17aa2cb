"""A private adapter as a part of a merge needs its caller's token as it does alone."""

from __future__ import annotations

import httpx
import pytest

from tests.adapter_store.hub_server import TOKEN

from .conftest import KEYS, PROMPT, Door
from .test_private_adapters import PRIVATE, hub, private

__all__ = ["hub", "private"]  # fixtures


async def generate(door: Door, who: str, *ids: str, token: str | None = None) -> httpx.Response:
    merged = {"ids": list(ids), "weights": [1.0] * len(ids)}
    parameters = {"merged_adapters": merged, "api_token": token, "max_new_tokens": 2}
    headers = {"authorization": f"Bearer {KEYS[who]}"}
    return await door.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters}, headers=headers)


@pytest.mark.parametrize("other", ["shout", "hub:acme/public"])
async def test_every_part_is_shown_to_its_callers_token_alone(private, other):
    hidden = await generate(private, "acme", other, PRIVATE)
    missing = await generate(private, "acme", other, "hub:acme/nothing")
    assert hidden.status_code == missing.status_code == 424
    assert hidden.text.replace("private", "nothing") == missing.text
    shown = await generate(private, "acme", other, PRIVATE, token=TOKEN)
    assert shown.status_code == 200, shown.text
    for who, token in (("acme", None), ("acme", "hf_wrong"), ("globex", None), ("limited", None)):  # resident by now
        assert (await generate(private, who, other, PRIVATE, token=token)).text == hidden.text
    assert (await generate(private, "globex", other, PRIVATE, token=TOKEN)).status_code == 200


async def test_what_the_operator_names_needs_no_token_and_is_not_read_with_it(private):
    assert (await generate(private, "acme", "shout", "shout")).status_code == 200
    assert (await generate(private, "acme", "shout", "shout", token="hf_wrong")).status_code == 200

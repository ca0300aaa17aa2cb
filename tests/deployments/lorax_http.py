"""LoRAX's endpoints as tests ask them."""

from __future__ import annotations

import json

import httpx

from examples.demo.words import held_out_prompts

(PROMPT,) = held_out_prompts(1)


async def generate(http: httpx.AsyncClient, path: str = "/generate", inputs: str = PROMPT, **parameters):
    return await http.post(path, json={"inputs": inputs, "parameters": parameters, "stream": path == "/"})


async def whole(http: httpx.AsyncClient, **parameters) -> dict:
    response = await generate(http, **{"details": True, **parameters})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(response: httpx.Response) -> list[dict]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    return [json.loads(line.removeprefix("data:")) for line in lines]


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()
    assert body.keys() == {"error", "error_type"}
    return response.status_code, body["error_type"], body["error"]

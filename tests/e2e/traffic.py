"""Requests that keep coming while something goes wrong, each with an answer that is known."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import httpx

from examples.demo.words import BASE, STYLES, answer, held_out_prompts

from .server import BASE_MODEL, Server

PROMPTS = held_out_prompts(200)


def model_of(style: str) -> str:
    return BASE_MODEL if style == BASE else style


class Stream:
    """One streaming request and what came of it."""

    def __init__(self, client: httpx.AsyncClient, model: str, prompt: str, options: dict[str, Any]) -> None:
        self.status = 0
        self.texts: list[str] = []
        self.error: dict[str, Any] | None = None
        self.finish: str | None = None
        self.done = False
        body = {"model": model, "prompt": prompt, "stream": True} | options
        self.task = asyncio.create_task(self._run(client, body))

    async def _run(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            self.status = response.status_code
            async for line in response.aiter_lines():
                if not line:
                    continue
                assert not self.done, "nothing may follow [DONE]"
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    self.done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    self.error = event["error"]
                    continue
                self.texts.append(event["choices"][0]["text"])
                self.finish = event["choices"][0]["finish_reason"] or self.finish


class Traffic:
    """Some clients that ask one thing after the other, half of them as streams, from entry to exit.

    ``wrong``: every answer that was not exactly right, and every request that failed. ``done``: how many were right.
    """

    def __init__(self, server: Server, clients: int = 6) -> None:
        self._url = server.url
        self._clients = clients
        self._numbers = itertools.count()
        self._stop = False
        self.done = 0
        self.wrong: list[Any] = []

    async def __aenter__(self) -> Traffic:
        self._http = httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=120)
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._clients)]
        await self.until_done(2 * self._clients)
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    async def until_done(self, more: int, seconds: float = 60.0) -> None:
        """Wait until so many more are right, or one is wrong."""
        enough = self.done + more
        async with asyncio.timeout(seconds):
            while self.done < enough and not self.wrong:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def _ask_on(self) -> None:
        while not self._stop:
            number = next(self._numbers)
            prompt, style = PROMPTS[number % len(PROMPTS)], STYLES[number % len(STYLES)]
            try:
                text = await self._ask({"model": model_of(style), "prompt": prompt}, stream=number % 2 == 0)
            except Exception as error:
                self.wrong.append((number, repr(error)))
                await asyncio.sleep(0.1)
                continue
            if text == answer(prompt, style):
                self.done += 1
            else:
                self.wrong.append((number, text))

    async def _ask(self, body: dict[str, Any], *, stream: bool) -> str:
        body |= {"max_tokens": 80, "temperature": 0, "stream": stream}
        if not stream:
            response = await self._http.post("/v1/completions", json=body)
            return response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
        if response.status_code != 200 or lines[-1:] != ["data: [DONE]"]:
            return f"{response.status_code} {lines[-1:]}"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        return "".join(event["choices"][0]["text"] if "choices" in event else str(event) for event in events)

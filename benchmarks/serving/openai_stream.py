"""Streamed requests to a server that speaks OpenAI's API, timed at this end."""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import aiohttp

from benchmarks.serving.answer import Answer, Ending

Api = Literal["completions", "chat"]
IDLE_SECONDS = 2.0  # less than a server keeps an idle connection open


def session(url: str) -> aiohttp.ClientSession:
    """A client of this server with as many connections as requests under way. To be made on a running loop."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
    return aiohttp.ClientSession(url.rstrip("/") + "/", connector=connector, timeout=aiohttp.ClientTimeout(total=None))


class _Failed(Exception):
    """What the server answered instead of tokens."""

    def __init__(self, ending: Ending, message: str) -> None:
        super().__init__(message)
        self.ending = ending


@dataclass(frozen=True, slots=True)
class OpenAIStream:
    """client: with the server's address. timeout_s: longest wait for a whole answer, from when it was due. until: no
    answer is awaited longer than to this moment of ``time.perf_counter``."""

    client: aiohttp.ClientSession
    api: Api
    timeout_s: float
    until: float = math.inf

    async def ask(self, model: str, prompt: str, tokens: int, due: float) -> Answer:
        """Stream one greedy answer of ``tokens`` tokens, end tokens ignored. Failures are in the answer, not raised."""
        sent = time.perf_counter()
        events: list[float] = []
        usage: dict[str, int] = {}
        texts: list[str] = []
        error: str | None = None
        ending = Ending.WHOLE
        try:
            async with asyncio.timeout(max(min(due + self.timeout_s, self.until) - sent, 0.0)):
                usage = await self._read(self._body(model, prompt, tokens), events, texts)
        except TimeoutError:
            error, ending = f"no whole answer within {self.timeout_s:g} s", Ending.LATE
        except _Failed as failure:
            error, ending = str(failure), failure.ending
        except (aiohttp.ClientError, OSError) as failure:
            error, ending = str(failure) or type(failure).__name__, Ending.CUT
        end = time.perf_counter()
        counts = usage.get("prompt_tokens", 0), usage.get("completion_tokens", len(events))
        return Answer(due, sent, tuple(events), end, *counts, error, ending, "".join(texts))

    def _body(self, model: str, prompt: str, tokens: int) -> dict[str, Any]:
        body = {
            "model": model,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.api == "chat":
            return body | {"messages": [{"role": "user", "content": prompt}]}
        return body | {"prompt": prompt}

    async def _read(self, body: dict[str, Any], events: list[float], texts: list[str]) -> dict[str, int]:
        """Append time and text of each event with tokens; returns the usage. Raises what stands in for an answer."""
        path = "v1/chat/completions" if self.api == "chat" else "v1/completions"
        usage: dict[str, int] = {}
        finished = False
        async with self.client.post(path, json=body) as response:
            if response.status != HTTPStatus.OK:
                raise _Failed(Ending.REFUSED, f"HTTP {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise _Failed(Ending.TOLD, str(event["error"].get("message", event["error"])))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    finished = finished or choice.get("finish_reason") is not None
                    text = choice["text"] if self.api == "completions" else choice["delta"].get("content")
                    # A chat's first event only says whose turn it is, and its last may only say that it ended.
                    if self.api == "completions" or text:
                        events.append(now)
                        texts.append(text)
        if not finished or not events:
            raise _Failed(Ending.CUT, "the stream ended without a finish_reason or without tokens")
        return usage

"""``/v1/embeddings`` over a ``CompletionService``: each input is a row that generates nothing."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from deployments.api.generation import Generation
from deployments.api.service import CompletionService
from deployments.protocol.embeddings import EmbeddingBody, embedding_list
from deployments.protocol.errors import invalid
from engine.request import check_length


def add_embedding_routes(app: FastAPI, service: CompletionService) -> None:
    """The endpoint, behind the app's own limits and error envelope."""

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingBody) -> Response:
        answer = await embed(service, body)
        # Half a million numbers are no rarity, and take a good part of a second to write.
        text = await service.directory.in_text_pool(json.dumps, answer)
        return Response(text, media_type="application/json")


async def embed(service: CompletionService, body: EmbeddingBody) -> dict[str, Any]:
    """OpenAI's answer. Raises ApiError, InvalidRequest, EngineOverloaded, an AdapterError or ReplicaLost."""
    with service.failures() as known:
        generation = await _start(service, body, known)
    chunks = await generation.finished()
    vectors = [chunk.embedding or () for chunk in chunks]
    return await service.directory.in_text_pool(embedding_list, body, vectors, generation.prompt_tokens)


async def _start(service: CompletionService, body: EmbeddingBody, known: list[str]) -> Generation:
    inputs, most = body.inputs(), service.limits.max_choices
    if len(inputs) > most:
        raise invalid("input", f"{len(inputs)} inputs are over the limit of {most}: send them in several requests")
    body.check_dimensions(service.spec.hidden_size)
    adapter = await service.resolve(body.model, known)
    prompts = await service.directory.in_text_pool(_token_ids, service, inputs)
    name = f"embd-{uuid.uuid4().hex}"
    requests = [
        service.request(f"{name}-{index}", prompt, adapter, body.user, pooling=body.pooling or "mean")
        for index, prompt in enumerate(prompts)
    ]
    streams = [service.generate(request, body.model, whole=True) for request in requests]
    generation = Generation(name, int(time.time()), body.model, streams)
    await service.begin(generation)
    return generation


def _token_ids(service: CompletionService, inputs: list[str | list[int]]) -> list[list[int]]:
    most, encode = service.max_model_len, service.tokenizer.encode
    prompts = [encode(one, most_tokens=most, param="input") if isinstance(one, str) else one for one in inputs]
    for prompt in prompts:
        check_length(len(prompt), 0, most, "input")
        if max(prompt) >= service.spec.vocab_size:
            raise invalid("input", f"input holds token {max(prompt)} but the model has {service.spec.vocab_size}")
    return prompts

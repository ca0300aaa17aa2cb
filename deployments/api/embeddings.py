"""``/v1/embeddings`` over a ``CompletionService``: each input is a row that generates nothing."""

from __future__ import annotations

import json
import time
import uuid
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from deployments.api.generation import Generation
from deployments.api.openapi import GENERATES, answers
from deployments.api.service import CompletionService, row
from deployments.observability.request_record import RequestRecord
from deployments.protocol.answers import EmbeddingList
from deployments.protocol.embeddings import EmbeddingBody, embedding_list
from deployments.protocol.errors import invalid
from deployments.tenants.admission import Admission
from deployments.tenants.caller import Caller, CallerOf
from engine.request import check_length


def add_embedding_routes(app: FastAPI, service: CompletionService) -> None:
    """The endpoint, behind the app's own limits and error envelope."""

    @app.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingList, *GENERATES))
    async def embeddings(body: EmbeddingBody, caller: CallerOf) -> Response:
        answer = await embed(service, body, caller)
        # Half a million numbers are no rarity, and take a good part of a second to write.
        text = await service.directory.in_text_pool(json.dumps, answer)
        return Response(text, media_type="application/json")


async def embed(service: CompletionService, body: EmbeddingBody, caller: Caller) -> dict[str, Any]:
    """OpenAI's answer. Raises ApiError, InvalidRequest, EngineOverloaded, an AdapterError or ReplicaLost."""
    generation = await service.begun(caller, partial(_start, service, body, caller), whole=True)
    chunks = await generation.finished()
    vectors = [chunk.embedding or () for chunk in chunks]
    return await service.directory.in_text_pool(embedding_list, body, vectors, generation.prompt_tokens)


async def _start(
    service: CompletionService, body: EmbeddingBody, caller: Caller, record: RequestRecord, admission: Admission
) -> Generation:
    inputs, most = body.inputs(), service.limits.max_choices
    if len(inputs) > most:
        raise invalid("input", f"{len(inputs)} inputs are over the limit of {most}: send them in several requests")
    body.check_dimensions(service.spec.hidden_size)
    adapter = await service.resolve(body.model, caller, record)
    prompts = await service.directory.in_text_pool(_token_ids, service, inputs)
    await admission.charge(sum(map(len, prompts)), 0)
    name = record.id = f"embd-{uuid.uuid4().hex}"
    record.choices = len(prompts)
    pooling = body.pooling or "mean"
    requests = [
        row(f"{name}-{index}", prompt, adapter, caller, body.user, pooling=pooling)
        for index, prompt in enumerate(prompts)
    ]
    streams = [service.recorded(request, body.model, caller, record) for request in requests]
    generation = Generation(name, int(time.time()), body.model, streams)
    await generation.begin()
    return generation


def _token_ids(service: CompletionService, inputs: list[str | list[int]]) -> list[list[int]]:
    most, encode = service.max_model_len, service.tokenizer.encode
    prompts = [encode(one, most_tokens=most, param="input") if isinstance(one, str) else one for one in inputs]
    for prompt in prompts:
        check_length(len(prompt), 0, most, "input")
        if max(prompt) >= service.spec.vocab_size:
            raise invalid("input", f"input holds token {max(prompt)} but the model has {service.spec.vocab_size}")
    return prompts

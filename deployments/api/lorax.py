"""LoRAX's endpoints over a ``CompletionService``: another form of the same completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from adapter_store.errors import AdapterNotFound
from deployments.api import sse
from deployments.api.explain import explain
from deployments.api.generation import Generation
from deployments.api.lorax_answers import GenerateAnswer, Info, StreamedToken, answers
from deployments.api.lorax_rendering import LoraxRendering, answer_headers, stream_headers
from deployments.api.service import CompletionService
from deployments.protocol.common import _MAX_STOPS
from deployments.protocol.errors import ApiError, from_validation
from deployments.protocol.lorax import BASE_MODEL_IDS, CompatBody, GenerateBody, LoraxCompletion, lorax_error
from deployments.tenants.caller import Caller, CallerOf


class LoraxRoute(APIRoute):
    """Every error in LoRAX's envelope, also those of a body that cannot be read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See ``APIRoute``."""
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except RequestValidationError as error:
                return _envelope(from_validation(error.errors()))
            except HTTPException as error:
                return _envelope(ApiError(error.status_code, str(error.detail), headers=error.headers))
            except Exception as error:  # every error has its envelope; unknown ones are logged and say nothing
                return _envelope(explain(error))

        return handler


def add_lorax_routes(app: FastAPI, service: CompletionService) -> None:
    """``/generate``, ``/generate_stream``, ``/`` and ``/info``."""
    lorax = _Lorax(service)
    router = APIRouter(route_class=LoraxRoute, tags=["LoRAX"])

    @router.post("/generate", response_model=None, responses=answers(GenerateAnswer))
    async def generate(body: GenerateBody, caller: CallerOf) -> Response:
        answer, headers = await lorax.answer(body, caller)
        return JSONResponse(answer, headers=headers)

    @router.post("/generate_stream", response_model=None, responses=answers(None, streamed=StreamedToken))
    async def generate_stream(body: GenerateBody, caller: CallerOf) -> Response:
        return await lorax.stream(body, caller)

    @router.post("/", response_model=None, responses=answers(list[GenerateAnswer], streamed=StreamedToken))
    async def generate_compatibly(body: CompatBody, caller: CallerOf) -> Response:
        if body.stream:
            return await lorax.stream(body, caller)
        answer, headers = await lorax.answer(body, caller)
        return JSONResponse([answer], headers=headers)

    @router.get("/info", responses={200: {"model": Info}})
    async def info() -> dict[str, Any]:
        return lorax.info()

    app.include_router(router)


class _Lorax:
    def __init__(self, service: CompletionService) -> None:
        self._service = service

    async def answer(self, body: GenerateBody, caller: Caller) -> tuple[dict[str, Any], dict[str, str]]:
        """The whole answer and its headers."""
        began = time.monotonic()
        completion = await self._completion(body, caller, stream=False)
        generation = await self._service.start(completion, stream=False, caller=caller)
        rendering = LoraxRendering(body, completion, self._service.tokenizer)
        chunks = await generation.finished()
        answer, best = await self._service.directory.in_text_pool(rendering.answer, chunks)
        return answer, answer_headers(body, self._service.base_model, best, time.monotonic() - began)

    async def stream(self, body: GenerateBody, caller: Caller) -> Response:
        """The answer token by token. What is wrong before the first of them has a status of its own."""
        completion = await self._completion(body, caller, stream=True)
        generation = await self._service.start(completion, stream=True, caller=caller)
        events = _events(LoraxRendering(body, completion, self._service.tokenizer), generation)
        return _TokenStream(generation, events, stream_headers(body, self._service.base_model))

    def info(self) -> dict[str, Any]:
        """What LoRAX tells of itself, as far as there is such a thing here."""
        service = self._service
        known = {
            "model_id": service.base_model,
            "max_best_of": service.limits.max_choices,
            "max_stop_sequences": _MAX_STOPS,
            "max_input_length": service.max_model_len - 1,
            "max_total_tokens": service.max_model_len,
            "validation_workers": service.limits.threads,
            "version": version("lorafleet"),
        }
        return {**dict.fromkeys(Info.model_fields), **known}

    async def _completion(self, body: GenerateBody, caller: Caller, *, stream: bool) -> LoraxCompletion:
        asked = body.parameters
        caller.api_token = asked.api_token or caller.api_token
        merged = asked.merged_adapters
        if merged is None:
            model = await self._name(body, asked.adapter_id or "", caller)
        else:
            names = {adapter_id: await self._name(body, adapter_id, caller) for adapter_id in merged.ids}
            model = str(merged.merge(names.__getitem__))
        prompt = await self._service.directory.in_text_pool(self._prompt, body)
        return body.completion(model, prompt, stream=stream)

    async def _name(self, body: GenerateBody, adapter_id: str, caller: Caller) -> str:
        """What it is called here: the first name that there is. Whether it may be used is decided where every request
        is; a name that may not is not looked for here either."""
        if adapter_id in BASE_MODEL_IDS:
            return self._service.base_model
        names = body.parameters.names_of(adapter_id)
        for name in names:
            if caller.tenant.permits(name):
                try:
                    await self._service.directory.named(name)
                except AdapterNotFound:
                    continue
                return name
        return names[0]

    def _prompt(self, body: GenerateBody) -> list[int]:
        keep = body.parameters.truncate
        most = self._service.max_model_len if keep is None else None  # what is cut off may be as long as a body may
        tokens = self._service.tokenizer.encode(body.inputs, most_tokens=most, param="inputs")
        return tokens if keep is None else tokens[-keep:]


class _TokenStream(sse.EventStream):
    """However the response ends, the generation has ended too."""

    def __init__(self, generation: Generation, events: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        self._generation = generation
        super().__init__(events)
        self.headers.update(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()


async def _events(rendering: LoraxRendering, generation: Generation) -> AsyncGenerator[bytes]:
    """The status is sent already: an error is an event of its own, the last."""
    try:
        async with aclosing(rendering.events(generation)) as stream:
            async for event in stream:
                yield sse.event(event)
    except Exception as error:
        yield sse.event(lorax_error(explain(error))[1])


def _envelope(error: ApiError) -> JSONResponse:
    status, body = lorax_error(error)
    return JSONResponse(body, status_code=status, headers=error.headers)

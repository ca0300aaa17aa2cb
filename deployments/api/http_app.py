"""The HTTP face: OpenAI's endpoints over a ``CompletionService``. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from adapter_store.errors import AdapterError
from deployments.api import sse
from deployments.api.body_limit import BodyLimit
from deployments.api.embeddings import add_embedding_routes
from deployments.api.explain import explain
from deployments.api.generation import Generation
from deployments.api.lorax import add_lorax_routes
from deployments.api.lorax_answers import StreamedToken
from deployments.api.openapi import GENERATES, answers, describe_events
from deployments.api.rendering import events, whole
from deployments.api.request_id import HEADER, RequestId, current_request_id
from deployments.api.service import CompletionService
from deployments.api.tokenize import add_tokenize_routes
from deployments.protocol.answers import ChatAnswer, ChatEvent, CompletionAnswer, Health, ModelList, ModelObject
from deployments.protocol.chat import ChatBody
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import ApiError, ReplicaLost, from_validation
from deployments.tenants.authentication import Keys, add_guard
from deployments.tenants.caller import Caller, CallerOf
from engine.request import EngineOverloaded, GenerationFailed, InvalidRequest


def create_http_app(
    service: CompletionService,
    *,
    keys: Keys | None = None,
    cors_origins: Sequence[str] = (),
    answers_carry_id: bool = True,
) -> FastAPI:
    """The routes, and the one error envelope for everything that can go wrong. keys, cors_origins: see ``add_guard``.
    answers_carry_id: see ``RequestId``.
    """
    app = FastAPI(title="LoRAFleet", docs_url="/docs", redoc_url=None, redirect_slashes=False)
    app.add_middleware(BodyLimit, max_bytes=service.limits.max_body_bytes)
    add_guard(app, keys, cors_origins)
    app.add_middleware(RequestId, answers=answers_carry_id)

    @app.get("/health", response_model=None, responses=answers(Health))
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def list_models(caller: CallerOf) -> dict[str, Any]:
        return await service.models(caller)

    @app.get("/v1/models/{name:path}", response_model=None, responses=answers(ModelObject, 404, 422, 503))
    async def get_model(name: str, caller: CallerOf) -> dict[str, Any]:
        return await service.model(name, caller)

    @app.post(
        "/v1/completions",
        response_model=None,
        responses=answers(CompletionAnswer, *GENERATES, streamed=CompletionAnswer),
    )
    async def completions(body: CompletionBody, caller: CallerOf) -> Response:
        return await _respond(service, body, caller)

    @app.post(
        "/v1/chat/completions", response_model=None, responses=answers(ChatAnswer, *GENERATES, streamed=ChatEvent)
    )
    async def chat_completions(body: ChatBody, caller: CallerOf) -> Response:
        return await _respond(service, body, caller)

    add_embedding_routes(app, service)
    add_tokenize_routes(app, service)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return _envelope(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def not_answered(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        message = {404: f"there is no {where}", 405: f"{where} is not allowed"}.get(
            error.status_code, str(error.detail)
        )
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        return _envelope(ApiError(error.status_code, message, code=code, headers=error.headers))

    async def refused(_: Request, error: Exception) -> JSONResponse:
        return _envelope(explain(error))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        response = _envelope(explain(error))  # sent from outside of every middleware
        if answers_carry_id:
            response.headers[HEADER] = current_request_id()
        return response

    describe_events(app, ChatEvent, StreamedToken)
    for kind in (ApiError, InvalidRequest, AdapterError, EngineOverloaded, GenerationFailed, ReplicaLost):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(Exception, failed)
    add_lorax_routes(app, service)
    return app


class GenerationStream(sse.EventStream):
    """A generation as server-sent events. However the response ends, the generation has ended too."""

    def __init__(self, generation: Generation, body: CompletionBody | ChatBody) -> None:
        self._generation = generation
        super().__init__(_event_stream(generation, body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()


async def _respond(service: CompletionService, body: CompletionBody | ChatBody, caller: Caller) -> Response:
    try:
        generation = await service.start(body, stream=bool(body.stream), caller=caller)
        if not body.stream:
            return JSONResponse(await whole(generation, body))
    except Exception as error:  # every error has its envelope; unknown ones are logged and say nothing
        return _envelope(explain(error))
    return GenerationStream(generation, body)


async def _event_stream(generation: Generation, body: CompletionBody | ChatBody) -> AsyncGenerator[bytes]:
    """The status is sent already: an error is an event of its own, and the stream still ends as it should."""
    try:
        async with aclosing(events(generation, body)) as stream:
            async for event in stream:
                yield sse.event(event)
    except Exception as error:
        yield sse.event(explain(error).body())
    yield sse.DONE


def _envelope(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

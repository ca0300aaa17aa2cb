"""The application's front: HTTP for clients, a Serve handle for other Ray applications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_store.catalog import Catalog
from deployments.adapters.admin import AdapterAdmin
from deployments.adapters.declaration_feed import DeclarationFeed
from deployments.adapters.directory import AdapterDirectory
from deployments.adapters.routes import add_adapter_routes, admin_rule
from deployments.api.embeddings import embed
from deployments.api.generation import Generation
from deployments.api.handle_errors import builtin_error
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService
from deployments.console.console import Console
from deployments.console.routes import add_console_routes
from deployments.console.serve_states import ServeStates
from deployments.draining import Drain
from deployments.fleet import Fleet
from deployments.hub import REPLICA_DEPLOYMENT, find_hub
from deployments.live import LiveConfig
from deployments.observability.catalog import GATEWAY
from deployments.observability.publisher import MetricPublisher
from deployments.observability.request_metrics import PERIOD_SECONDS, RequestMetrics
from deployments.observability.telemetry import Telemetry
from deployments.observability.tracing import IncomingTrace, Tracing
from deployments.protocol.chat import ChatBody
from deployments.protocol.common import read_body, usage
from deployments.protocol.completions import CompletionBody
from deployments.protocol.embeddings import EmbeddingBody
from deployments.protocol.errors import from_exception
from deployments.replicas import ServedReplicas, ask_every
from deployments.routing.routing_counters import counters
from deployments.settings import FleetSettings
from deployments.tenants.gate import Gate
from engine.request import GenerationChunk, TokenLogprob

logger = logging.getLogger("ray.serve")


class Gateway:
    """Serve deployment. One code path answers HTTP and handle calls.

    From another Ray application::

        handle = serve.get_app_handle("lorafleet")
        handle.generate.remote({"model": "shout", "prompt": "robot, old, eats, school"}).result()
        for item in handle.options(stream=True).stream.remote({...}): ...

    The dict holds what the body of ``/v1/completions`` (``prompt``) or ``/v1/chat/completions`` (``messages``)
    holds. A ``tenant`` beside them is whose request it is: what that tenant may use and how much holds for it. Without,
    everything may be used: who can call a handle is code of this cluster. ``api_token``: see ``Caller``. Errors are
    built-in exceptions: see ``handle_errors``.
    """

    def __init__(self, replicas: DeploymentHandle, settings: dict[str, Any]) -> None:
        args = FleetSettings.model_validate(settings)
        limits = args.service_limits()
        keys_file = args.gateway.keys_file
        self._gate = Gate(None if keys_file is None else args.path(keys_file), stated_open=args.gateway.open)
        self._replicas = replicas
        self._config = LiveConfig(args)
        catalog, declares = Catalog(args.store_settings()), args.gateway.admin != "off"
        self._directory = AdapterDirectory(args.base_model_name, catalog, limits.threads, declares=declares)
        self._hub_found = False
        self._feed = DeclarationFeed(self._find_hub, self._directory.hear)
        self._directory.feed = self._feed
        name = serve.get_replica_context().replica_id.unique_id
        self._tracing = Tracing(args.tracing.endpoint, args.tracing.sample, name)
        metrics = RequestMetrics(args.gateway.metric_adapters, args.gateway.metric_tenants)
        self._metrics = MetricPublisher(GATEWAY, metrics.read, PERIOD_SECONDS)
        fleet = Fleet(replicas, self._tracing.tracer)
        states = ServeStates(serve.get_replica_context().app_name, REPLICA_DEPLOYMENT)
        served = ServedReplicas(replicas)
        self._console = Console(args.base_model_name, catalog, served, self.routing_counters, states.read)
        self._drain = Drain(args.gateway_grace_s(), fleet.stop, self._console.feed.close)
        self._service = CompletionService(
            self._directory,
            args.model_folder(),
            fleet,
            args.max_model_len(),
            limits,
            Telemetry(metrics, self._tracing.tracer),
            args.gateway.tool_format,
            self._gate.admissions,
        )
        load_seconds = args.store_settings().hub_download_timeout_s
        self._admin = AdapterAdmin(self._directory, self._feed, served, load_seconds)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor: the routes close over this replica's service."""
        section = self._config.settings.gateway
        app = create_http_app(
            self._service,
            keys=self._gate.keys,
            cors_origins=section.cors_origins,
            answers_carry_id=False,  # Serve's proxy sees to that
        )
        if self._tracing.on:
            app.add_middleware(IncomingTrace)
        add_adapter_routes(app, self._admin, section.admin, lambda: self._config.refused)
        if section.admin != "off":
            add_console_routes(app, self._console.feed, admin_rule(section.admin))
        return app

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Put a ``user_config`` into force, see ``LiveSettings``. One with a mistake changes nothing."""
        await asyncio.to_thread(
            self._config.take, user_config, lambda live: self._directory.reconfigure(live.store_settings())
        )

    async def check_health(self) -> None:
        """Called by Serve, on the loop that requests run on: the ear for declarations opens here at the latest."""
        self._feed.start()
        self._metrics.start()
        self._drain.start()
        self._gate.start()

    async def __del__(self) -> None:
        """Called by Serve at the end."""
        await asyncio.to_thread(self._tracing.close)

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """One whole answer: ``{"id", "model", "text", "token_ids", "finish_reason", "stop_reason", "logprobs",
        "prompt_logprobs", "usage", "choices"}``.

        The fields from text to prompt_logprobs are the first choice's; ``choices`` holds one such dict, with an
        ``index``, for each prompt and sample. ``logprobs`` is None or a list of ``{"token_id", "logprob", "text",
        "top"}``; so is ``prompt_logprobs``, with None for the prompt's first token. Raises built-in exceptions with
        ``status``, ``code``, ``type`` and ``param``.
        """
        generation = await self._start(request, stream=False)
        try:
            chunks = await generation.finished()
        except Exception as error:
            raise _told(error) from None
        choices = [{"index": index, **_plain(chunk)} for index, chunk in enumerate(chunks)]
        first = {name: value for name, value in choices[0].items() if name != "index"}
        used = usage(generation.prompt_tokens, generation.completion_tokens)
        return {"id": generation.id, "model": generation.model, **first, "usage": used, "choices": choices}

    async def stream(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Pieces as they are made: ``{"index", "text", "token_ids", "finish_reason", "stop_reason", "logprobs",
        "prompt_logprobs"}``.

        The last piece of a choice has its finish reason and ``usage`` so far. Raises as ``generate`` does, also in
        mid-stream.
        """
        generation = await self._start(request, stream=True)
        try:
            async with aclosing(generation.chunks()) as chunks:
                async for index, chunk in chunks:
                    item = {"index": index, **_plain(chunk)}
                    if chunk.finish_reason is not None:
                        item["usage"] = usage(generation.prompt_tokens, generation.completion_tokens)
                    yield item
        except Exception as error:
            raise _told(error) from None

    async def embed(self, request: dict[str, Any]) -> dict[str, Any]:
        """What ``POST /v1/embeddings`` answers to this body. Raises as ``generate`` does."""
        try:
            return await embed(self._service, read_body(EmbeddingBody, request), self._gate.caller(request))
        except Exception as error:
            raise _told(error) from None

    async def models(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """The base model and the adapters that may be named (by this tenant), as ``GET /v1/models`` lists them."""
        return (await self._service.models(self._gate.caller({"tenant": tenant})))["data"]

    async def fleet_stats(self) -> list[dict[str, Any]]:
        """``LoraReplica.stats()`` of every replica that answers."""
        return await ask_every(self._replicas, "stats")

    def routing_counters(self) -> dict[str, int]:
        """Routing decisions of this process by reason: resident, spread, host_cached, home, least_loaded."""
        return counters.as_dict()

    async def _find_hub(self) -> Any:
        """Without asking a replica: there may be none, and asking would start one."""
        context = serve.get_replica_context()
        find = partial(find_hub, context.app_name, context.code_version or "", any_version=self._hub_found)
        hub = await asyncio.get_running_loop().run_in_executor(None, find)
        self._hub_found = True
        return hub

    async def _start(self, request: dict[str, Any], *, stream: bool) -> Generation:
        try:
            chat = isinstance(request, dict) and "messages" in request
            body = read_body(ChatBody if chat else CompletionBody, request)
            return await self._service.start(body, stream=stream, caller=self._gate.caller(request))
        except Exception as error:
            raise _told(error) from None


def _plain(chunk: GenerationChunk) -> dict[str, Any]:
    return {
        "text": chunk.text,
        "token_ids": list(chunk.token_ids),
        "finish_reason": chunk.finish_reason,
        "stop_reason": chunk.stop_reason,
        "logprobs": [_plain_token(token) for token in chunk.logprobs] or None,
        "prompt_logprobs": [token and _plain_token(token) for token in chunk.prompt_logprobs] or None,
    }


def _plain_token(token: TokenLogprob) -> dict[str, Any]:
    top = [list(entry) for entry in token.top]
    return {"token_id": token.token_id, "logprob": token.logprob, "text": token.text, "top": top}


def _told(error: Exception) -> Exception:
    explained = from_exception(error)
    if explained.status == 500:
        logger.error("request failed", exc_info=error)
    return builtin_error(explained)

"""A real engine on the demo model in this process, and the HTTP app over it: everything but Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracer, Tracer

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from deployments import wire
from deployments.adapters.directory import AdapterDirectory
from deployments.adapters.replica_adapters import ReplicaAdapters
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService, ServiceLimits
from deployments.observability.request_metrics import RequestMetrics
from deployments.observability.request_record import RequestRecord
from deployments.observability.spans import generation_span
from deployments.observability.telemetry import Telemetry
from deployments.observability.tracing import carried
from deployments.pacing import together
from engine.engine import Engine
from engine.request import GenerationChunk, GenerationRequest
from engine.settings import EngineSettings

DEMO = Path(__file__).parents[2] / "examples" / "demo"
BASE_MODEL = "lorafleet-demo"
# Nothing listens on port 9 (discard), so this Hub is always unavailable.
STORE = StoreSettings(
    folders=(str(DEMO / "adapters"),),
    allow=("hub:acme/*",),
    hub_endpoint="http://127.0.0.1:9",
    hub_retries=0,
    hub_timeout_s=1.0,
)


class LocalFleet:
    """One engine in the place of the replicas; chunks and errors cross the wire format all the same."""

    def __init__(self, engine: Engine, tracer: Tracer | None = None) -> None:
        self.engine = engine
        self.tracer = tracer or NoOpTracer()
        self.adapters = ReplicaAdapters(engine)

    async def generate(
        self, request: GenerationRequest, model: str, record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        try:
            with (
                generation_span(self.tracer, carried(record.span), request, "local") as progress,
                self.adapters.used_by_request(request.adapter, request.adapter_digest, request.api_token),
            ):
                chunks = self.engine.generate(GenerationRequest.from_dict(request.to_dict()))
                items = together(chunks) if record.whole else chunks
                async with aclosing(chunks), aclosing(items):
                    async for chunk in items:
                        progress.last = chunk
                        yield wire.decode(wire.encode_chunk(chunk), model)
        except wire.REFUSALS as error:
            wire.decode(wire.encode_error(error, "local"), model)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    settings = EngineSettings(
        str(DEMO / "model"), BASE_MODEL, cpu_threads=1, max_rows=8, max_waiting=24, slots=((16, 3),), store=STORE
    )
    made = Engine(settings)
    asyncio.run(made.start())
    yield made
    asyncio.run(made.close())


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Where spans of requests go."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test")


@pytest.fixture
def metrics() -> RequestMetrics:
    return RequestMetrics(adapters=50, tenants=50)


@pytest.fixture
def fleet(engine: Engine, tracer: Tracer) -> LocalFleet:
    return LocalFleet(engine, tracer)


@pytest.fixture
def service(fleet: LocalFleet, metrics: RequestMetrics, tracer: Tracer) -> Iterator[CompletionService]:
    limits = ServiceLimits(max_choices=16, threads=2, max_body_bytes=2**16)
    directory = AdapterDirectory(BASE_MODEL, Catalog(STORE), limits.threads)
    made = CompletionService(
        directory, DEMO / "model", fleet, fleet.engine.max_model_len, limits, Telemetry(metrics, tracer)
    )
    yield made
    made.close()


@pytest.fixture
async def http(service: CompletionService):
    transport = httpx.ASGITransport(create_http_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(service: CompletionService) -> AsyncGenerator[openai.AsyncOpenAI]:
    """OpenAI's own client, at the service's HTTP application."""
    transport = httpx.ASGITransport(create_http_app(service), raise_app_exceptions=False)
    http = httpx.AsyncClient(transport=transport, base_url="http://test/v1")
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http) as made:
        yield made

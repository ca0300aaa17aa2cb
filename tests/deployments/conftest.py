"""A real engine on the demo model in this process, and the HTTP app over it: everything but Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from deployments import wire
from deployments.adapters.directory import AdapterDirectory
from deployments.adapters.replica_adapters import ReplicaAdapters
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService, ServiceLimits
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

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.adapters = ReplicaAdapters(engine)

    async def generate(
        self, request: GenerationRequest, model: str, *, whole: bool = False
    ) -> AsyncGenerator[GenerationChunk]:
        try:
            with self.adapters.used_by_request(request.adapter, request.adapter_digest, request.api_token):
                chunks = self.engine.generate(GenerationRequest.from_dict(request.to_dict()))
                items = together(chunks) if whole else chunks
                async with aclosing(chunks), aclosing(items):
                    async for chunk in items:
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
def fleet(engine: Engine) -> LocalFleet:
    return LocalFleet(engine)


@pytest.fixture
def service(fleet: LocalFleet) -> Iterator[CompletionService]:
    limits = ServiceLimits(max_choices=16, threads=2, max_body_bytes=2**16)
    directory = AdapterDirectory(BASE_MODEL, Catalog(STORE), limits.threads)
    made = CompletionService(directory, DEMO / "model", fleet, fleet.engine.max_model_len, limits)
    yield made
    made.close()


@pytest.fixture
async def http(service: CompletionService):
    transport = httpx.ASGITransport(create_http_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client

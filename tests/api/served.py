"""The real app over a real engine of the demo model, on a port of this machine: everything but Ray."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from adapter_store.catalog import Catalog
from deployments.adapters.directory import AdapterDirectory
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService, ServiceLimits
from engine.engine import Engine
from engine.settings import EngineSettings
from tests.deployments.conftest import BASE_MODEL, DEMO, STORE, LocalFleet


@contextmanager
def served(max_model_len: int | None = None) -> Iterator[str]:
    """The address, as long as it is served. max_model_len: short, for those who do not care what the model says."""
    listener = socket.create_server(("127.0.0.1", 0))
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        settings = EngineSettings(
            str(DEMO / "model"),
            BASE_MODEL,
            cpu_threads=1,
            max_rows=8,
            max_waiting=64,
            max_model_len=max_model_len,
            slots=((16, 3),),
            store=STORE,
        )
        engine = Engine(settings)
        await engine.start()
        limits = ServiceLimits(max_choices=16, threads=2, max_body_bytes=2**18)
        directory = AdapterDirectory(BASE_MODEL, Catalog(STORE), limits.threads)
        service = CompletionService(directory, DEMO / "model", LocalFleet(engine), engine.max_model_len, limits)
        server = uvicorn.Server(uvicorn.Config(create_http_app(service), log_level="error"))
        running = asyncio.ensure_future(server.serve([listener]))
        started.set()
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await running
        service.close()
        await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        if not started.wait(60):
            raise RuntimeError("the engine did not start within a minute")
        host, port = listener.getsockname()
        yield f"http://{host}:{port}"
    finally:
        stop.set()
        thread.join(30)

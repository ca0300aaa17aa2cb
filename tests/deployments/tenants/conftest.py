"""The HTTP app with keys, over a real engine and a real register in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from adapter_store.catalog import Catalog
from adapter_store.settings import StoreSettings
from deployments.adapters.directory import AdapterDirectory
from deployments.adapters.routes import add_adapter_routes
from deployments.api.http_app import create_http_app
from deployments.api.service import CompletionService, ServiceLimits
from deployments.tenants.admission import Admissions
from deployments.tenants.keys import key_hash
from deployments.tenants.live_keys import LiveKeys
from deployments.tenants.register import TenantRegister
from tests.deployments.conftest import BASE_MODEL, DEMO, STORE

PROMPT = "robot, old, eats, school"
KEYS = {name: f"lf-{name}-canary-7f3a9e" for name in ("acme", "globex", "limited", "admin")}


class LocalRegister:
    """``await register.method.remote(...)`` on a real register; ``dead``: every call fails as a dead actor's."""

    def __init__(self, *, anew: bool = False) -> None:
        self.register = TenantRegister(anew=anew)
        self.calls: list[str] = []
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        register = self

        class Remote:
            def remote(self, *args: Any) -> Any:
                register.calls.append(method)
                return self._call(*args) if method != "leave" else self._now(*args)

            async def _call(self, *args: Any) -> Any:
                if register.dead:
                    raise ValueError("the actor is dead")
                return await getattr(register.register, method)(*args)

            def _now(self, *args: Any) -> None:
                if not register.dead:
                    register.register._ledger.leave(*args)

        return Remote()


class Door:
    """One gateway with a keys file."""

    def __init__(self, fleet, folder: Path, store: StoreSettings = STORE, access: Any = "on", **tenants: Any) -> None:
        self.file = folder / "keys.yaml"
        self.tenants = tenants
        self.write()
        self.keys = LiveKeys(self.file)
        self.register = LocalRegister()
        self.admissions = Admissions(self._find)
        self.directory = AdapterDirectory(BASE_MODEL, Catalog(store), 2)
        self.service = CompletionService(
            self.directory,
            DEMO / "model",
            fleet,
            fleet.engine.max_model_len,
            ServiceLimits(),
            admissions=self.admissions,
        )
        self.app = create_http_app(self.service, keys=self.keys, cors_origins=["https://app.acme.com"])
        orders: Any = self
        add_adapter_routes(self.app, orders, access)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)

    # The only orders that these tests give to an AdapterAdmin.
    async def page(self, after: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
        return [{"name": name} for name in await self.directory.names()], False

    prefetch = pin = unpin = refresh = page

    async def _find(self) -> LocalRegister:
        if self.register.dead:
            raise ValueError("there is no actor")
        return self.register

    def write(self) -> None:
        entries = {name: {"keys": [key_hash(KEYS[name])]} | entry for name, entry in self.tenants.items()}
        self.file.write_text(yaml.safe_dump({"admin": [key_hash(KEYS["admin"])], "tenants": entries}))

    async def get(self, path: str, who: str | None, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers=authorization(who) | headers)

    async def complete(self, who: str | None, model: str, **body: Any) -> httpx.Response:
        headers = authorization(who) | body.pop("headers", {})
        asked = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 4} | body
        return await self.http.post("/v1/completions", json=asked, headers=headers)

    async def close(self) -> None:
        await self.admissions.close()
        self.service.close()
        await self.http.aclose()


def authorization(who: str | None) -> dict[str, str]:
    return {} if who is None else {"authorization": f"Bearer {KEYS.get(who, who)}"}


@pytest.fixture
async def door(fleet, tmp_path):
    made = Door(
        fleet,
        tmp_path,
        acme={"adapters": ["shout", "acme-*", "hub:acme/*"]},
        globex={"adapters": ["json", "mirror"], "base_model": False, "weight": 2.0},
        limited={"adapters": ["shout"], "requests_per_minute": 5, "tokens_per_minute": 400, "concurrency": 2},
    )
    yield made
    await made.close()

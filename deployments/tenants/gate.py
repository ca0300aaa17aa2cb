"""What a gateway knows of tenants: the keys, where requests are counted, and how Serve lets the world in."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from deployments.protocol.errors import invalid
from deployments.tenants.admission import Admissions
from deployments.tenants.caller import Caller, operator
from deployments.tenants.live_keys import LiveKeys
from deployments.tenants.open_mode import open_mistake
from deployments.tenants.register import find_register
from deployments.tenants.tenant import Tenant

TENANT, API_TOKEN = "tenant", "api_token"  # of a handle call's dict


class Gate:
    """One gateway's."""

    def __init__(self, keys_file: Path | None, *, stated_open: bool) -> None:
        """Raises ValueError when the keys file cannot be used, or when anybody could come in unasked."""
        mistake = open_mistake(http_host(), keys_file and str(keys_file), stated=stated_open)
        if mistake is not None:
            raise ValueError(mistake)
        self.keys = None if keys_file is None else LiveKeys(keys_file)
        self.admissions = Admissions(_register)

    def start(self) -> None:
        """Begin to follow the keys file, on the running loop. A second call does nothing."""
        if self.keys is not None:
            self.keys.start()

    def caller(self, request: Any) -> Caller:
        """Who a handle call is for: the ``tenant`` that its dict names, or the caller itself, who is code of this
        cluster and may use everything. Raises ApiError for a tenant that there is not."""
        said = request if isinstance(request, dict) else {}
        for field in (TENANT, API_TOKEN):
            if not isinstance(said.get(field), str | None):
                raise invalid(field, f"{field} is a {type(said[field]).__name__} but must be a string")
        caller = operator() if said.get(TENANT) is None else self._of_tenant(said[TENANT])
        caller.api_token = said.get(API_TOKEN)
        return caller

    def _of_tenant(self, name: str) -> Caller:
        if self.keys is None:
            return Caller(Tenant(name))
        if (tenant := self.keys.table.tenants.get(name)) is None:
            raise invalid(TENANT, f"tenant is {name!r}, of which the keys file says nothing")
        return Caller(tenant, "tenant")


def http_host() -> str | None:
    """Where Serve's HTTP proxies listen; None when there are none."""
    client: Any = _get_global_client()
    options = client.http_config
    return None if options.location in (None, ProxyLocation.Disabled, "NoServer") else options.host


async def _register() -> Any:
    app_name = serve.get_replica_context().app_name
    return await asyncio.get_running_loop().run_in_executor(None, partial(find_register, app_name))

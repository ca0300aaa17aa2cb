"""Who sent one request, and with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends, Request

from adapter_store.source import AdapterRef
from deployments.tenants.tenant import Tenant

Role = Literal["anyone", "tenant", "admin"]
EVERYTHING = Tenant()  # of nobody in particular, without limits
_STATE = "caller"


@dataclass(slots=True)
class Caller:
    """One request's sender. Made for each request: ``headers`` are for its answer.

    role: "anyone" where there are no keys, else whose key it was. api_token: with which the source of an adapter is to
    show it (LoRAX's ``api_token``), never kept and never logged. headers: sent with the answer, whatever that is.
    """

    tenant: Tenant = EVERYTHING
    role: Role = "anyone"
    api_token: str | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict)

    def counts_as(self, user: str | None) -> str:
        """Whose service a request counts as. ``user`` (OpenAI's field) is who its sender says it is: where there are
        keys nobody may say so, neither to pose as another tenant nor to be many at once."""
        return self.tenant.name or user or ""

    def token_for(self, name: str) -> str | None:
        """With which what this name leads to is read; none for an operator's name, whose source is not the caller's."""
        return self.api_token if AdapterRef.is_meant(name) else None


def operator() -> Caller:
    """Code of the cluster itself, which may use everything."""
    return Caller(role="admin")


def remember(scope_state: dict[str, object], caller: Caller) -> None:
    """Put the caller where ``CallerOf`` finds it."""
    scope_state[_STATE] = caller


def caller_of(request: Request) -> Caller:
    """Who sent it. Raises AttributeError in an application without ``Authentication``."""
    return getattr(request.state, _STATE)


CallerOf = Annotated[Caller, Depends(caller_of)]

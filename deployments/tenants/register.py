"""The one place of a cluster where an application's tenants are counted: a small actor, made when the first limit is.

It is not the hub: a change of ``args`` brings another hub beside the old one, and two would let twice as many in.
It keeps nothing on a disk. Ray starts it anew when it dies; every gateway then tells it what it was let do, and until
they had time for that it lets nobody in.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import exit_actor

from deployments.hub import SERVE_NAMESPACE
from deployments.tenants.ledger import Entry, Ledger, Verdict
from deployments.tenants.tenant import Limits

RECALL_SECONDS = 3.0  # how long gateways have to tell a new register what they know
IDLE_SECONDS = 600.0


class TenantRegister:
    """A ``Ledger`` for all gateways. Every call says which register its sender has told what it knows; None is the
    answer to one that has told another, and is to introduce itself."""

    def __init__(self, *, anew: bool | None = None) -> None:
        """anew: whether one before it died; None has Ray say so."""
        self._ledger = Ledger(time.monotonic)
        self._epoch = uuid.uuid4().hex
        self._asked = time.monotonic()
        if anew is None:
            anew = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._complete_at = time.monotonic() + (RECALL_SECONDS if anew else 0.0)
        self._watched = False

    async def introduce(self, owner: str, before: str | None, entries: Sequence[Entry]) -> str:
        """A gateway tells what it was let do in the last minute, and hears which register this is. before: the register
        that it told last."""
        self._asked = time.monotonic()
        if before == self._epoch:
            self._ledger.resume(owner, entries)
        else:
            self._ledger.restore(owner, entries)
        return self._epoch

    async def enter(self, owner: str, epoch: str | None, lease: str, tenant: str, limits: Limits) -> Verdict | None:
        """See ``Ledger``."""
        self._asked = time.monotonic()
        await asyncio.sleep(max(0.0, self._complete_at - time.monotonic()))
        return self._ledger.enter(owner, lease, tenant, limits) if epoch == self._epoch else None

    async def charge(self, owner: str, epoch: str | None, lease: str, tokens: int, limits: Limits) -> Verdict | None:
        """See ``Ledger``."""
        await asyncio.sleep(max(0.0, self._complete_at - time.monotonic()))
        known = epoch == self._epoch and self._ledger.knows(lease)
        return self._ledger.charge(owner, lease, tokens, limits) if known else None

    async def leave(self, owner: str, lease: str, tokens: int) -> None:
        """See ``Ledger``."""
        self._ledger.leave(owner, lease, tokens)

    async def confirm(self, owner: str, epoch: str | None, running: Sequence[str]) -> list[str] | None:
        """See ``Ledger``."""
        self._asked = time.monotonic()
        return self._ledger.confirm(owner, running) if epoch == self._epoch else None

    async def end_when_idle(self) -> None:
        """Have this actor end when nobody has asked for long: what it knows is out of date by then."""
        if self._watched:
            return
        self._watched = True
        while True:
            left = self._asked + IDLE_SECONDS - time.monotonic()
            if left <= 0:
                exit_actor()
            await asyncio.sleep(left)


def find_register(app_name: str) -> Any:
    """The register of an application, made if there is none. Blocks on the cluster's store."""
    made: Any = (
        ray.remote(TenantRegister)
        .options(
            name=f"lorafleet-tenants:{app_name}",
            namespace=SERVE_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote()
    )
    made.end_when_idle.remote()
    return made

"""What goes wrong round an engine that serves a crowd: a Hub out of its mind, files cut short, processes killed."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapter_store.digest import WEIGHTS_FILE
from tests.adapter_store.fetching import Fetcher
from tests.adapter_store.hub_server import Fault, HubServer
from tests.engine.crowd import Tenant

_QUEUED = 3  # faults that wait for a request: more would leave nothing to work


@dataclass(slots=True)
class CrowdFaults:
    """hub: has the adapters of ``far`` as ``hub:<owner>/<name>``. near: those in folders under ``folder``.

    root: where a process that fetches keeps its disk cache, ``cache``, of ``disk_bytes``. happened: what was done.
    """

    hub: HubServer
    far: Sequence[Tenant]
    near: Sequence[Tenant]
    folder: Path
    root: Path
    disk_bytes: int
    rng: random.Random
    happened: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        """All of it at once; at the end everything is whole again."""
        tasks = [asyncio.create_task(work()) for work in (self._confuse, self._cut_short, self._kill)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            self.hub.heal()
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    async def _confuse(self) -> None:
        """Answers that are errors, late, cut short, or damaged, now and then one after a client's patience."""
        while True:
            with self.hub._lock:
                queued = len(self.hub._faults)
            if queued < _QUEUED:
                where = self.rng.choice(("/api/", "/cdn/", "/resolve/"))
                what = self.rng.choice(("status", "status", "late", "cut", "damaged", "silent"))
                fault = {
                    "status": Fault(where, status=self.rng.choice((500, 503, 429))),
                    "late": Fault(where, delay_s=self.rng.random() * 0.2),
                    "cut": Fault("/cdn/", cut=self.rng.random()),
                    "damaged": Fault("/cdn/", corrupt=True),
                    "silent": Fault(where, delay_s=1.5),
                }[what]
                self.hub.fail(fault)
                self.happened[what] += 1
            await asyncio.sleep(self.rng.random() * 0.1)

    async def _cut_short(self) -> None:
        """A publisher writes in place and dies; somebody puts it right a moment later."""
        while True:
            tenant = self.rng.choice(self.near)
            file = self.folder / tenant.name / WEIGHTS_FILE
            whole = tenant.files[WEIGHTS_FILE]
            os.truncate(file, self.rng.randrange(len(whole)))
            try:
                await asyncio.sleep(self.rng.random() * 0.3)
            finally:
                draft = file.with_name(".draft")
                draft.write_bytes(whole)
                draft.replace(file)
            self.happened["truncated"] += 1
            await asyncio.sleep(0.02)

    async def _kill(self) -> None:
        """Other processes of the machine download into the same disk cache, and are killed while they do."""
        while True:
            refs = [f"hub:{owner_of(tenant)}/{tenant.name}" for tenant in self.rng.sample(self.far, len(self.far))]
            fetcher = Fetcher(self.hub.endpoint, self.root, refs, self.disk_bytes, undaunted=True)
            try:
                await asyncio.sleep(0.1 + self.rng.random() * 0.5)
                assert fetcher.process.is_alive()
            finally:
                fetcher.kill()
            self.happened["killed"] += 1
            await asyncio.sleep(0.5)


def owner_of(tenant: Tenant) -> str:
    """Whose account on the Hub it is: a quarter of the threads for downloads each."""
    return ("acme", "globex", "initech")[int(tenant.name[1:]) % 3]

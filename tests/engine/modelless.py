"""Everything of an engine but its model: real files, threads, host memory, slots, pages and step loop, turned by hand.

In the place of the model stands a check: whatever a row reads, weights in its slot and earlier tokens in its pages,
must be its own adapter's and its own.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from adapter_store.checkpoint import pack_checkpoint
from adapter_store.packed import PackedAdapter
from adapter_store.settings import StoreSettings
from adapter_store.slots import SlotPool
from adapter_store.store import AdapterStore
from engine.flight import SampledToken
from engine.kv_pages import PagePool
from engine.output import OutputQueue
from engine.parts import EngineParts
from engine.request import GenerationRequest, SamplingParams
from engine.residents import ResidentAdapters
from engine.scheduler import StepPlan
from engine.sequence import Sequence
from engine.settings import EngineSettings
from engine.step_loop import StepLoop
from tests.adapter_store.plain_adapters import LAYOUT, write_adapter

STUCK_S = 20.0  # far beyond any load: the loop sleeps and nobody will wake it


class Adapters:
    """A folder of tiny adapters ``a0``, ``a1``, ...: every third has rank 16, the others 8. And ``bad``, refused."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.packed: dict[str, PackedAdapter] = {}
        for number in range(count):
            path = write_adapter(folder / "adapters" / f"a{number}", seed=number, rank=16 if number % 3 == 2 else 8)
            self.packed[f"a{number}"] = pack_checkpoint(path, LAYOUT, 16, torch.float32, f"a{number}")
        write_adapter(folder / "adapters" / "bad", use_dora=True)

    def digest(self, name: str) -> str:
        return self.packed[name].digest


class _Flight:
    def __init__(self, plan: StepPlan) -> None:
        self.rows = [row for row in plan.rows if row.samples]
        ends = [row.sequence for row in plan.rows if row.end == len(row.sequence.tokens)]
        self.undrawn = tuple(sequence for sequence in ends if not sequence.draws)

    def read(self) -> list[SampledToken]:
        return [SampledToken(7 + row.end % 50) for row in self.rows]


class CheckingRunner:
    """Launches plans by checking what they would read."""

    def __init__(self, slots: SlotPool, pages: PagePool, adapters: Adapters) -> None:
        self._slots, self._pages, self._adapters = slots, pages, adapters
        self._kv: dict[tuple[int, int], tuple[str | None, int, int]] = {}  # (page, place) -> adapter, position, token
        self.served: Counter[str] = Counter()  # tenant -> tokens drawn
        self.steps = 0

    def launch(self, plan: StepPlan) -> _Flight:
        self.steps += 1
        for row in plan.rows:
            sequence = row.sequence
            name = sequence.request.adapter
            assert (sequence.slot is None) == (name is None), "a row of an adapter without a slot"
            if sequence.slot is not None and name is not None:
                assert self._slots.ready(sequence.slot)
                want = self._adapters.packed[name].slab
                start = int(self._slots.slot_table[sequence.slot.index, 0])
                assert torch.equal(self._slots.arena[start : start + want.numel()], want), "another adapter's weights"
            size = self._pages.page_size
            for position in range(row.end):
                at = sequence.pages[position // size], position % size
                own = name, position, sequence.tokens[position]
                if position < row.start:
                    adapter, place, token = self._kv[at]
                    assert (adapter, place) == own[:2], "another's page"
                    assert token in (own[2], -1), "other tokens in a shared page"
                else:
                    self._kv[at] = own
            self.served[sequence.tenant] += row.samples
        flight = _Flight(plan)
        places = iter(range(len(flight.rows)))
        for row in plan.rows:
            row.sequence.launched(row.end, next(places) if row.samples else None)
        return flight


class ModellessEngine:
    """Turned by ``turn`` and ``drain``; to be made and used within a running event loop."""

    def __init__(
        self, adapters: Adapters, *, slots: dict[int, int], host_units: int, pages: int = 64, **overrides: Any
    ) -> None:
        """host_units: adapters of rank 8 that host memory has room for."""
        self.adapters = adapters
        unit = 4 * LAYOUT.slab_elements(8)
        store_settings = StoreSettings(
            root=adapters.folder, folders=("adapters",), host_cache_bytes=host_units * unit + 64, negative_ttl_s=0.0
        )
        settings = EngineSettings(
            **{"model": "none", "slots": tuple(slots.items()), "store": store_settings, "load_threads": 2, **overrides}
        )
        self.pool = SlotPool(LAYOUT, slots, torch.float32, "cpu", poison=True)
        self.store = AdapterStore(store_settings, LAYOUT, torch.float32, max(slots))
        self.pages = PagePool(pages, 4)
        self.runner = CheckingRunner(self.pool, self.pages, adapters)
        parts: Any = EngineParts(
            spec=None,  # type: ignore[arg-type]
            tokenizer=None,
            eos_token_ids=frozenset(),
            max_model_len=256,
            runner=self.runner,  # type: ignore[arg-type]
            pages=self.pages,
            slots=self.pool,
            store=self.store,
            grammars=None,
        )
        self.loop = StepLoop(parts, settings)
        self.sequences: list[Sequence] = []
        self._arrivals = itertools.count()

    def ask(
        self, adapter: str | None, prompt: int = 4, new: int = 4, *, tenant: str = "", resolved: bool = True
    ) -> Sequence:
        digest = self.adapters.digest(adapter) if resolved and adapter in self.adapters.packed else None
        arrival = next(self._arrivals)
        tokens = tuple(range(prompt)) if arrival % 2 else tuple(range(1, prompt + 1))
        request = GenerationRequest(
            f"r{arrival}", tokens, SamplingParams(temperature=0.0, max_tokens=new), adapter, digest, tenant
        )
        sequence = Sequence(request, arrival, prompt + new, seed=0, queue=OutputQueue())
        self.loop.submit(sequence)
        self.sequences.append(sequence)
        return sequence

    def question(self, put: Callable[[ResidentAdapters, Future[Any]], None]) -> Future[Any]:
        answer: Future[Any] = Future()
        self.loop.ask(lambda residents: put(residents, answer), answer)
        return answer

    @property
    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.finished]

    def turn(self) -> None:
        """One turn of the step loop; waits for a thread where there is nothing else to do."""
        deadline = time.monotonic() + STUCK_S
        with torch.inference_mode():
            while self.loop._idle():
                assert time.monotonic() < deadline, f"nobody will wake the loop: {self.loop.stats()}"
                time.sleep(0.0002)
            self.loop._turn()
        self.check()

    def finish_loads(self) -> None:
        """Turn once for each load that a thread ends, until none is at work: steps hardly go on meanwhile."""
        loads = self.loop._loads
        assert loads is not None
        self.turn()
        while any(load.needs is None for load in loads._loads.values()):
            deadline = time.monotonic() + STUCK_S
            while not self.loop._inbox:
                assert time.monotonic() < deadline, "a load does not end"
                time.sleep(0.0002)
            self.turn()

    def drain(self, turns: int = 5000) -> None:
        """Turn until everybody is done."""
        for _ in range(turns):
            if not self.unfinished:
                break
            self.turn()
        assert not self.unfinished, f"requests wait for ever: {self.loop.stats()}"
        while not self.loop._idle():
            self.turn()

    def check(self) -> None:
        """What holds between any two turns."""
        scheduler = self.loop._scheduler
        host = self.store.host_cache.stats()
        assert host.bytes <= host.budget_bytes
        users = Counter(s.slot.index for s in (*scheduler.running, *scheduler.waiting) if s.slot is not None)
        for slot in self.pool._slots:
            assert slot.refs == users[slot.index], "slot references are not those of the requests"
        for sequence in scheduler.running:
            assert sequence.adapter is None, "a running row keeps host memory"
        owned = Counter(page for sequence in scheduler.running for page in sequence.pages)
        assert self.pages.num_pages - self.pages.free_pages == len(owned)
        waiting = list(scheduler.waiting)
        assert len(waiting) == len(scheduler.waiting) == sum(scheduler.waiting.tenants().values())

    def check_rest(self) -> None:
        """What holds when nobody is left."""
        loads = self.loop._loads
        assert loads is not None
        while loads._loads:  # of requests that left
            self.turn()
        stats = self.loop.stats()
        assert (stats.running, stats.waiting, stats.waiting_for_adapter, stats.slots_in_use) == (0, 0, 0, 0)
        assert stats.free_pages == stats.num_pages
        assert stats.host_referenced_bytes == 0, "references to host memory were not given back"

    def close(self) -> None:
        loads = self.loop._loads
        assert loads is not None
        loads.close()
        self.store.close()

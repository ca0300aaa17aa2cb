"""The thread that plans and runs steps. It owns all mutable state; others leave it messages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from engine.fairness import TokenWeights
from engine.flight import Flight, SampledToken, not_finite
from engine.loading import AdapterLoads
from engine.output import Outbox, fresh
from engine.parts import EngineParts
from engine.request import (
    EngineDead,
    EngineOverloaded,
    FinishReason,
    GenerationChunk,
    InvalidRequest,
    TokenLogprob,
)
from engine.residents import ResidentAdapters
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.settings import EngineSettings
from engine.stats import MOST_TENANTS, EngineLoad, EngineStats
from engine.step_meter import StepMeter, timings

_log = logging.getLogger(__name__)
_COPY_PATIENCE_S = 1e-3
_MASK_PATIENCE_S = 2e-3  # of a step; a row whose mask takes longer is left out until it has one


class StepLoop:
    """Plans a step, runs it, hands out what it produced; sleeps when there is nothing to do.

    ``submit``, ``abort``, ``leave``, ``stop``, ``load`` and ``stats`` may be called from any thread; the rest is the
    loop's own.
    """

    def __init__(self, parts: EngineParts, settings: EngineSettings) -> None:
        self.parts = parts
        self._limit = settings.max_rows + settings.max_waiting
        self._scheduler = Scheduler(
            parts.pages,
            parts.slots,
            max_rows=settings.max_rows,
            max_batch_tokens=settings.max_batch_tokens,
            max_overtakes=settings.max_overtakes,
            max_mixed_tokens=settings.max_mixed_tokens,
            prefix_cache=settings.prefix_cache,
            weights=TokenWeights(settings.input_weight, settings.output_weight, settings.tenant_weights),
            let_go=None if parts.store is None else parts.store.host_cache.release,
        )
        self._loads: AdapterLoads | None = None
        self._residents: ResidentAdapters | None = None
        if parts.store is not None and parts.slots is not None:
            self._loads = AdapterLoads(
                parts.store,
                parts.slots,
                self._scheduler.waiting,
                settings.load_threads,
                settings.download_threads,
                self._post,
                self._scheduler.add,
                self._close,
            )
            assert self._scheduler.assignment is not None
            to_slot = self._scheduler.assignment.to_slot
            self._residents = ResidentAdapters(
                parts.store.host_cache, parts.slots, parts.pages, self._loads, to_slot, self._uses
            )
        self._outbox = Outbox()
        self._flight: Flight | None = None  # the step launched last
        self._wake = threading.Condition()
        # Guarded by _wake: messages to the loop, and every sequence that is not finished.
        self._inbox: list[Callable[[], None]] = []
        self._sequences: dict[str, Sequence] = {}
        self._ended: EngineDead | None = None
        self.meter = StepMeter()

    @property
    def healthy(self) -> bool:
        """False once the loop has stopped, for whatever reason."""
        return self._ended is None

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence in. Raises EngineOverloaded, EngineDead, and InvalidRequest for an id in use."""
        request_id = sequence.request.request_id
        start = self._scheduler.add
        if sequence.request.adapter is not None:
            assert self._loads is not None
            start = self._loads.start
        with self._wake:
            if self._ended is not None:
                raise fresh(self._ended)
            if len(self._sequences) >= self._limit:
                raise EngineOverloaded(
                    f"{len(self._sequences)} requests are running or waiting, as many as max_rows and max_waiting "
                    "allow: try again later"
                )
            if request_id in self._sequences:
                raise InvalidRequest(f"request_id {request_id!r} is in use by a running request", "request_id")
            self._sequences[request_id] = sequence
            self._post(lambda: start(sequence))

    def abort(self, request_id: str) -> None:
        """End the request that has this id now, before the next step; nothing happens when none has."""
        with self._wake:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._post(lambda: self._abort(sequence))

    def leave(self, sequence: Sequence) -> None:
        """``abort`` by the only reader: nobody waits for the outcome, and the id is free again at once."""
        self._forget(sequence)
        self._post(lambda: self._abort(sequence))

    def ask(self, question: Callable[[ResidentAdapters], None], answer: Future[Any]) -> None:
        """Have the loop ask something of the resident adapters before the next step; ``answer`` is what it fills.

        Raises EngineDead, and ValueError where there are no adapter slots.
        """
        residents = self._residents
        if residents is None:
            raise ValueError("this engine has no adapter slots: set slots, such as {16: 32}")
        with self._wake:
            if self._ended is not None:
                raise fresh(self._ended)
            self._post(lambda: residents.ask(question, answer))

    def stop(self) -> None:
        """End the loop after the step under way; unfinished requests get EngineDead."""
        self._post(lambda: self._end(EngineDead("the engine was closed")))

    def load(self) -> EngineLoad:
        """What weighs on the loop now. Takes no lock."""
        running, slots = tuple(self._scheduler.running), self.parts.slots
        held = [sequence.slot for sequence in running]  # each read once: the loop may give one back meanwhile
        waiting = len(self._scheduler.waiting) + (0 if self._loads is None else self._loads.waiting)
        free = () if slots is None else tuple(slots.available().items())
        return EngineLoad(len(running), waiting, sum(slot.rank for slot in held if slot is not None), free)

    def stats(self) -> EngineStats:
        """A picture of now. Numbers of the same moment up to the step under way."""
        parts, scheduler = self.parts, self._scheduler
        residency = None if parts.slots is None else parts.slots.residency()
        slots = None if parts.slots is None else parts.slots.stats()
        host = None if parts.store is None else parts.store.host_cache.stats()
        tenants = scheduler.waiting.tenants()
        return EngineStats(
            healthy=self.healthy,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_for_adapter=0 if self._loads is None else self._loads.waiting,
            longest_wait_s=scheduler.waiting.longest_s(),
            waiting_tenants=len(tenants),
            waiting_by_tenant=tuple(sorted(tenants.items(), key=lambda entry: -entry[1])[:MOST_TENANTS]),
            num_pages=parts.pages.num_pages,
            free_pages=parts.pages.free_pages,
            resident=() if residency is None else tuple(residency.adapters),
            residency_version=0 if residency is None else residency.version,
            host_cached=() if parts.store is None else parts.store.host_cache.digests(),
            host_bytes=0 if host is None else host.bytes,
            host_referenced_bytes=0 if host is None else host.referenced_bytes,
            host_budget_bytes=0 if host is None else host.budget_bytes,
            pinned=() if parts.slots is None else parts.slots.pinned,
            prefetches=self._prefetches(),
            slots_in_use=0 if parts.slots is None else parts.slots.in_use,
            slot_hits=0 if slots is None else slots.hits,
            slot_misses=0 if slots is None else slots.misses,
            slot_evictions=0 if slots is None else slots.evictions,
            preemptions=scheduler.preemptions,
            reused_tokens=scheduler.reused_tokens,
            prompt_tokens=self.meter.prompt_tokens,
            generated_tokens=self.meter.generated_tokens,
            steps=self.meter.steps,
            last_step_seconds=self.meter.last_step_seconds,
        )

    def _prefetches(self) -> int:
        if self._residents is None or self._scheduler.assignment is None:
            return 0
        return self._residents.prefetches + self._scheduler.assignment.prefetches

    def run(self) -> None:
        """Turn until stopped or broken. The body of the engine's thread."""
        with torch.inference_mode():
            try:
                while self._ended is None:
                    self._turn()
            except Exception as error:
                _log.exception("the step loop broke; every request is failed")
                dead = EngineDead(f"the step loop broke: {type(error).__name__}: {error}; replace this replica")
                dead.__cause__ = error
                self._end(dead)
        if self._loads is not None:
            self._loads.close()

    def _turn(self) -> None:
        with self._wake:
            # Nobody tells when a copy has read its host memory, for which others may wait: the last one ends the wait.
            copying = self._settle_copies()
            while self._idle() and (not copying or self._settle_copies()):
                self._wake.wait(_COPY_PATIENCE_S if copying else None)
            inbox, self._inbox = self._inbox, []
        for message in inbox:
            message()
        if self._loads is not None:
            self._settle_copies()
            self._loads.settle()
        if self._ended is None:
            self._step()
        if self._residents is not None:
            self._residents.settle()
        if lost := self._outbox.post():
            with self._wake:
                unread = [sequence for sequence in self._sequences.values() if sequence.queue in lost]
            for sequence in unread:
                self._abort(sequence)

    def _idle(self) -> bool:
        """Whether there is nothing to do before the next message."""
        ready = any(not sequence.held for sequence in self._scheduler.running)
        busy = self._inbox or self._flight or ready or self._scheduler.waiting
        return not busy and (self._loads is None or not self._loads.unblocked)

    def _settle_copies(self) -> int:
        """Let go of the host memory that copies to slots have read; returns how many are under way."""
        return 0 if self.parts.slots is None else self.parts.slots.settle()

    def _step(self) -> None:
        """Launch the next step, then read the one before it: the device has work while its results are handed out."""
        started = time.monotonic()
        plan = self._scheduler.plan()
        stuck = not plan.rows and not self._flight and self._scheduler.waiting and not plan.held
        assert not stuck, "requests wait although nothing runs"
        for sequence in plan.reload:
            assert self._loads is not None
            self._loads.start(sequence)
        landing, self._flight = self._flight, None
        if plan.rows:
            self._flight = self.parts.runner.launch(plan)
            for sequence in self._flight.undrawn:
                self._scheduler.remove(sequence)  # whatever takes its room comes after this step
        self.meter.launched(plan, started)
        if landing is not None:
            drawn = landing.read()
            self.meter.landed(landing.rows, time.monotonic())
            for row, sampled in zip(landing.rows, drawn, strict=True):
                self._advance(row.sequence, sampled)
            for sequence in landing.undrawn:
                self._end_undrawn(sequence)
            self._follow_grammars([row.sequence for row in landing.rows if not row.sequence.finished])
        self.meter.last_step_seconds = time.monotonic() - started

    def _advance(self, sequence: Sequence, sampled: SampledToken) -> None:
        """Add a drawn token to its sequence, see whether that ends it, and hand out the chunk.

        A sequence that ended meanwhile may have gone through one step more; what that drew is dropped.
        """
        if sequence.finished:
            return
        token = sampled.token_id
        if token is None or not sequence.land():
            self._close(sequence, not_finite(sequence))
            return
        sequence.read(token)
        if sequence.grammar is not None:
            sequence.grammar.advance(token)
        self.meter.generated_tokens += 1
        text, reason, stop = self._finish_check(sequence, token)
        request = sequence.request
        chunk = GenerationChunk(
            request.request_id,
            text,
            (token,),
            sequence.prompt_tokens,
            sequence.completion_tokens,
            () if request.sampling.logprobs is None else (self._logprob(token, sampled),),
            reason,
            stop,
            None if reason is None else timings(sequence, sequence.drawn_at),
        )
        if reason is not None:
            self._close(sequence, chunk)
        elif sequence.queue is not None:
            self._outbox.add(sequence.queue, chunk)

    def _end_undrawn(self, sequence: Sequence) -> None:
        """Hand out the only chunk of a request that draws nothing. ``Engine.generate`` puts in what was read."""
        if not sequence.finished:
            last = _empty(sequence, "length" if sequence.request.pooling is None else "stop")
            self._close(sequence, last if sequence.land() else not_finite(sequence))

    def _follow_grammars(self, sequences: list[Sequence]) -> None:
        """See what may come next in those that follow a grammar, while the device works on other rows."""
        following = [sequence for sequence in sequences if sequence.grammar is not None]
        if not following:
            return
        assert self.parts.grammars is not None
        states = [sequence.grammar for sequence in following if sequence.grammar is not None]
        for sequence, ahead in zip(following, self.parts.grammars.look_ahead(states, _MASK_PATIENCE_S), strict=True):
            if ahead.done():
                self._followed(sequence, ahead)
            else:
                ahead.add_done_callback(lambda done, late=sequence: self._post(lambda: self._followed(late, done)))

    def _followed(self, sequence: Sequence, ahead: Future[None]) -> None:
        ahead.result()
        assert sequence.grammar is not None
        error = sequence.grammar.error
        if error is not None and not sequence.finished:
            self._close(sequence, InvalidRequest(f"the grammar cannot be followed on: {error}", "grammar"))

    def _finish_check(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
        """(text that the token brought, why the sequence is finished or None, what stopped it)."""
        params, output = sequence.request.sampling, sequence.text
        text, stop = "", None
        reason: FinishReason | None = None
        if token in params.stop_token_ids:
            reason, stop = "stop", token
        elif token in self.parts.eos_token_ids and not params.ignore_eos:
            reason = "stop"
        elif output is not None:
            text, stop = output.push(token)
            reason = None if stop is None else "stop"
        if reason is None and sequence.grammar is not None and sequence.grammar.ended:
            reason = "stop"
        if reason is None and sequence.known >= sequence.max_tokens:
            reason = "length"
        if reason is not None and output is not None and not isinstance(stop, str):
            rest, found = output.finish()
            text += rest
            if found is not None:
                reason, stop = "stop", found
        return text, reason, stop

    def _logprob(self, token: int, sampled: SampledToken) -> TokenLogprob:
        tokenizer = self.parts.tokenizer

        def name(token_id: int) -> str:
            return "" if tokenizer is None else tokenizer.token_text(token_id)

        assert sampled.logprob is not None
        top = tuple((token_id, value, name(token_id)) for token_id, value in sampled.top)
        return TokenLogprob(token, sampled.logprob, name(token), top)

    def _abort(self, sequence: Sequence) -> None:
        if sequence.finished:
            return
        if self._loads is not None:
            self._loads.drop(sequence)
        self._close(sequence, _empty(sequence, "abort"))

    def _close(self, sequence: Sequence, last: GenerationChunk | Exception) -> None:
        """End one request with its last chunk or an error; the others go on."""
        if self._scheduler.has(sequence):  # not one that draws no token and is under way, nor one still loading
            self._scheduler.remove(sequence)
        sequence.finished = True
        self._forget(sequence)
        assert sequence.queue is not None
        self._outbox.add(sequence.queue, last)

    def _end(self, error: EngineDead) -> None:
        with self._wake:
            if self._ended is not None:
                return
            self._ended = error
            sequences, self._sequences = list(self._sequences.values()), {}
        for sequence in sequences:
            assert sequence.queue is not None
            self._outbox.add(sequence.queue, error)
        self._outbox.post()
        if self._residents is not None:
            self._residents.end(error)

    def _uses(self, digest: str) -> bool:
        """Whether a request that is not finished needs this adapter."""
        with self._wake:
            return any(sequence.digest == digest for sequence in self._sequences.values())

    def _forget(self, sequence: Sequence) -> None:
        with self._wake:
            if self._sequences.get(sequence.request.request_id) is sequence:
                del self._sequences[sequence.request.request_id]

    def _post(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(message)
            self._wake.notify()


def _empty(sequence: Sequence, reason: FinishReason) -> GenerationChunk:
    ids, counts = (sequence.request.request_id, "", ()), (sequence.prompt_tokens, sequence.completion_tokens)
    return GenerationChunk(*ids, *counts, finish_reason=reason, timings=timings(sequence, time.monotonic()))

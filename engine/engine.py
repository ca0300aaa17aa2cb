"""The engine as others use it: an asyncio front for the step loop's thread."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import get_args

import torch

from adapter_store.errors import AdapterRefused
from adapter_store.slots import Residency
from engine.grammar import GrammarState
from engine.output import OutputQueue
from engine.parts import EngineParts, build_parts
from engine.prompt_reading import reading_for
from engine.request import (
    CONTEXT_LENGTH_EXCEEDED,
    EngineDead,
    GenerationChunk,
    GenerationRequest,
    Grammar,
    InvalidRequest,
    Pooling,
    check_length,
)
from engine.sequence import Sequence
from engine.settings import EngineSettings
from engine.spec import ModelSpec
from engine.stats import EngineLoad, EngineStats
from engine.step_loop import StepLoop
from engine.step_meter import StepMeter
from engine.text_stream import OutputText
from engine.tokenizer import Tokenizer

# Prompt tokens that a completion's text is decoded after: enough for any decoder to see that it goes on.
_TEXT_CONTEXT = 8
_COMPILERS = 2  # threads


class Engine:
    """One model with its adapters, generating for many requests at once.

        engine = Engine(EngineSettings(model="path/to/model"))
        await engine.start()
        async for chunk in engine.generate(request):
            print(chunk.text, end="")
        await engine.close()

    The work is done in a thread of the engine's own; ``generate`` may be used from any number of event loops.
    """

    def __init__(self, settings: EngineSettings, on_residency: Callable[[Residency], None] | None = None) -> None:
        """on_residency: called after each change of what is in the adapter slots, on the engine's own thread: it
        must not block (hand the news to an event loop with ``call_soon_threadsafe``)."""
        self.settings = settings
        self._on_residency = on_residency
        self._loop: StepLoop | None = None
        self._thread: threading.Thread | None = None
        self._arrivals = itertools.count()
        self._compilers = ThreadPoolExecutor(_COMPILERS, "engine-grammars")
        self._random = random.Random(settings.seed)  # noqa: S311 (draws of tokens, nothing secret)

    async def start(self) -> None:
        """Load the model and begin to serve. Returns when requests can be answered; call it once.

        Raises ValueError, FileNotFoundError and the like, naming the setting or the file and the remedy.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started before: make a new one")
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="engine-steps", daemon=True)
        self._thread.start()
        try:
            await asyncio.wrap_future(ready)
        except asyncio.CancelledError:
            if not ready.cancel() and ready.exception() is None:  # it came up before anybody could hear of it
                await self.close()
            raise

    async def close(self) -> None:
        """Stop after the step under way. Unfinished requests end with EngineDead."""
        if self._loop is None or self._thread is None:
            return
        self._loop.stop()
        self._compilers.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join)
        if self.parts.grammars is not None:
            self.parts.grammars.close()
        if self.parts.store is not None:
            await asyncio.to_thread(self.parts.store.close)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Chunks of one request, the first as soon as there is a token; a slow reader gets several as one.

        The last chunk has a ``finish_reason``. A request for ``pooling`` has a single chunk with its embedding: it is
        a row like others, prefilled in chunks and in the same order, but draws no token; so does one for ``max_tokens``
        0. Leaving early (``aclose``,
        cancellation, an abandoned loop) aborts the request. Raises, before or between chunks: InvalidRequest,
        EngineOverloaded, EngineDead, GenerationFailed and the AdapterError family.
        """
        loop = self._started()
        sequence = self._sequence(request)
        reading = sequence.reading
        if request.sampling.grammar is not None:
            sequence.grammar = await self._start_grammar(request.sampling.grammar)
        loop.submit(sequence)
        ended = False
        try:
            while not ended:
                assert sequence.queue is not None
                try:
                    chunk = await sequence.queue.get()
                except Exception:
                    ended = True
                    raise
                ended = chunk.finish_reason is not None
                if reading is not None and reading.landed:
                    chunk = await asyncio.to_thread(reading.tell, chunk, self.parts.tokenizer)
                    reading = None
                yield chunk
        finally:
            if not ended:
                loop.leave(sequence)

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its reader gets a last chunk with finish_reason "abort"."""
        self._started().abort(request_id)

    async def prefetch(self, name: str, digest: str | None = None) -> bool:
        """Bring an adapter to host memory and, where a slot is free or may be evicted, into a slot; no request needed.

        name, digest: as in GenerationRequest. Returns whether it has a slot now. Raises the AdapterError family.
        """
        answer: Future[bool] = Future()
        self._started().ask(lambda residents: residents.prefetch(name, digest, answer), answer)
        return await asyncio.wrap_future(answer)

    async def pin(self, digest: str) -> None:
        """Give the adapter a slot for good, as soon as there is one; nothing evicts it then, only ``unload``.

        Raises AdapterNotFound for one that is neither in a slot nor in host memory (``prefetch`` it first), and
        PinRefused when no slot would be left that every adapter can go to.
        """
        answer: Future[None] = Future()
        self._started().ask(lambda residents: residents.pin(digest, answer), answer)
        await asyncio.wrap_future(answer)

    async def unpin(self, digest: str) -> bool:
        """Let the adapter be evicted again, or give up pinning it; False when there was nothing to undo."""
        answer: Future[bool] = Future()
        self._started().ask(lambda residents: residents.unpin(digest, answer), answer)
        return await asyncio.wrap_future(answer)

    async def unload(self, digest: str, wait_s: float = 0.0) -> bool:
        """Free the adapter's slot (pinned or not), its place in host memory and the KV pages kept for its prompts.

        Waits up to ``wait_s`` seconds for requests that use it, and does nothing but return False when some still do.
        """
        wait = wait_s > 0
        answer: Future[bool] = Future()
        self._started().ask(lambda residents: residents.unload(digest, answer, wait=wait), answer)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(answer), wait_s if wait else None)
        except TimeoutError:
            return False

    def load(self) -> EngineLoad:
        """What weighs on the engine now. Any thread, as often as you like."""
        return self._started().load()

    def stats(self) -> EngineStats:
        """What the engine is doing now. Cheap; any thread."""
        return self._started().stats()

    @property
    def meter(self) -> StepMeter:
        """What the step loop has counted. Read only; any thread."""
        return self._started().meter

    @property
    def healthy(self) -> bool:
        """Whether requests can be answered: started, not closed, and the step loop has not broken."""
        return self._loop is not None and self._loop.healthy

    @property
    def parts(self) -> EngineParts:
        """Model, tokenizer, pages, slots and store of a started engine. The step loop's thread owns what changes."""
        return self._started().parts

    @property
    def spec(self) -> ModelSpec:
        """The base model's shape."""
        return self.parts.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RuntimeError for random weights without one."""
        if self.parts.tokenizer is None:
            raise RuntimeError(f"{self.settings.model} has no tokenizer.json")
        return self.parts.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return self.parts.max_model_len

    def _run(self, ready: Future[None]) -> None:
        try:
            with torch.inference_mode():
                loop = StepLoop(build_parts(self.settings, self._on_residency), self.settings)
        except BaseException as error:
            if ready.set_running_or_notify_cancel():
                ready.set_exception(error)
            return
        if ready.set_running_or_notify_cancel():  # else whoever called start() has given up
            self._loop = loop
            ready.set_result(None)
            loop.run()

    async def _start_grammar(self, grammar: Grammar) -> GrammarState:
        grammars = self.parts.grammars
        if grammars is None:
            raise InvalidRequest("a grammar needs a tokenizer, which this model has not", "grammar")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compilers, grammars.start, grammar)
        except RuntimeError as error:  # shut down, before or meanwhile
            raise EngineDead("the engine was closed") from error

    def _started(self) -> StepLoop:
        if self._loop is None:
            raise EngineDead("the engine is not running: await start() first")
        return self._loop

    def _sequence(self, request: GenerationRequest) -> Sequence:
        """Check all of the request that can be checked without its adapter."""
        parts, params = self.parts, request.sampling
        if request.pooling is not None and request.pooling not in get_args(Pooling):
            raise InvalidRequest(f"pooling is {request.pooling!r} but must be mean or last", "pooling")
        prompt_tokens = len(request.prompt_token_ids)
        wanted = params.max_tokens if request.pooling is None else 0
        max_tokens = check_length(prompt_tokens, wanted, parts.max_model_len)
        # A completion's last token needs no room: its keys and values are never used.
        room = parts.pages.capacity + request.draws
        if max_tokens > room:
            if wanted is not None or prompt_tokens >= room:
                raise InvalidRequest(
                    f"the prompt's {prompt_tokens} tokens and its completion (max_tokens {wanted}) are more "
                    f"than the {room} tokens that a KV cache of {parts.pages.num_pages} pages has room for: shorten "
                    "them, or have num_pages raised",
                    "prompt" if prompt_tokens >= room else "max_tokens",
                    CONTEXT_LENGTH_EXCEEDED,
                )
            max_tokens = room
        worst = max(request.prompt_token_ids), min(request.prompt_token_ids)
        if worst[0] >= parts.spec.vocab_size or worst[1] < 0:
            bad = worst[0] if worst[0] >= parts.spec.vocab_size else worst[1]
            raise InvalidRequest(f"token id {bad} is not below the vocabulary size {parts.spec.vocab_size}", "prompt")
        if request.adapter is not None and parts.store is None:
            raise AdapterRefused(request.adapter, "this engine has no adapter slots: set slots, such as {16: 32}")
        if request.adapter is None and request.adapter_digest is not None:
            raise InvalidRequest(f"adapter_digest {request.adapter_digest!r} comes without an adapter", "adapter")
        vocab_size = parts.spec.vocab_size
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token id {token}, which is not below the vocabulary size {vocab_size}",
                    "logit_bias",
                )
        text: OutputText | None = None
        if parts.tokenizer is not None:
            text = OutputText(parts.tokenizer, params.stop, request.prompt_token_ids[-_TEXT_CONTEXT:])
        elif params.stop:
            raise InvalidRequest("stop strings need a tokenizer, which this model has not: use stop_token_ids", "stop")
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else parts.eos_token_ids)}
        end_tokens = tuple(sorted(token for token in ends if 0 <= token < vocab_size))
        return Sequence(
            request,
            next(self._arrivals),
            max_tokens,
            seed,
            text,
            OutputQueue(),
            reading=reading_for(request),
            end_tokens=end_tokens,
        )

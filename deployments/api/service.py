"""From a validated request to running generations: one path for HTTP and for handle calls."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from adapter_store.errors import AdapterChanged
from adapter_store.merging_recipe import MARK, Merge
from adapter_store.source import ResolvedAdapter
from deployments.adapters.directory import AdapterDirectory
from deployments.api.chat_prompts import ChatPrompts
from deployments.api.generation import Generation
from deployments.api.tool_formats import tool_format
from deployments.fleet import Generator
from deployments.observability.request_record import RequestRecord
from deployments.observability.telemetry import Telemetry
from deployments.protocol.chat import ChatBody
from deployments.protocol.completions import CompletionBody, Echo
from deployments.protocol.errors import from_exception, invalid
from deployments.protocol.models import model_list, model_object
from deployments.tenants.admission import Admission, Admissions
from deployments.tenants.caller import Caller
from engine.grammar import check_grammar
from engine.request import GenerationChunk, GenerationRequest, InvalidRequest, Pooling, SamplingParams, check_length
from engine.spec import ModelSpec
from engine.text_stream import TextStream
from engine.tokenizer import Tokenizer

Begin = Callable[[RequestRecord, Admission], Awaitable[Generation]]

CLIENT_LEFT = 499  # what is told of a request whose client did not wait for an answer


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """max_choices: most completions one request may ask for (prompts x n). threads: for text and local
    look-ups, and for look-ups at one source.
    max_body_bytes: longest HTTP request body.

    Raises ValueError naming the field.
    """

    max_choices: int = 128
    threads: int = 8
    max_body_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ValueError(f"{entry.name} is {getattr(self, entry.name)!r} but must be 1 or more")


class CompletionService:
    """Names models, turns text into tokens, and starts generations."""

    def __init__(
        self,
        directory: AdapterDirectory,
        model_folder: Path,
        generator: Generator,
        max_model_len: int,
        limits: ServiceLimits | None = None,
        telemetry: Telemetry | None = None,
        tool_form: str | None = None,
        admissions: Admissions | None = None,
    ) -> None:
        """max_model_len: most tokens of a prompt and its completion together, as the engines have it. telemetry:
        told of each request. tool_form: how the model writes down calls, see ``tool_formats``; None finds out.
        admissions: where requests of tenants with limits are let in; without, they are not.

        Raises ValueError when the folder has no usable tokenizer.
        """
        self.base_model = directory.base_model
        self.directory = directory
        self._folder = model_folder
        self.tokenizer = Tokenizer.from_dir(model_folder)
        self._generator = generator
        self.max_model_len = max_model_len
        self.spec = ModelSpec.from_dir(model_folder)
        self.limits = limits or ServiceLimits()
        self._telemetry = telemetry or Telemetry()
        self.admissions = admissions or Admissions()
        self._started = int(time.time())
        self._tool_form = tool_form
        self.chat_prompts = ChatPrompts(self.tokenizer, directory, max_model_len)
        self._fingerprint = f"fp_{_content_hash(model_folder)}"

    async def start(self, body: CompletionBody | ChatBody, *, stream: bool, caller: Caller) -> Generation:
        """Begin to generate: on return every choice has its first chunk, or without ``stream`` its only one.

        Raises ApiError, InvalidRequest, EngineOverloaded, an AdapterError or ReplicaLost; nothing runs on then.
        """
        return await self.begun(caller, partial(self._start, body, caller), whole=not stream)

    async def begun(self, caller: Caller, begin: Begin, *, whole: bool) -> Generation:
        """What ``begin`` begins, let in and recorded from before it until its end. Raises as ``start`` does."""
        record = self._telemetry.begin(whole=whole)
        record.tenant = caller.tenant.name
        try:
            async with self.admissions.admitted(caller) as admission:
                generation = await begin(record, admission)
        except asyncio.CancelledError:
            self._telemetry.end(record, CLIENT_LEFT)
            raise
        except Exception as error:
            explained = from_exception(error)
            record.error = explained.code or type(error).__name__
            self._telemetry.end(record, explained.status)
            raise

        def ended(prompts: int, completions: int) -> None:
            admission.leave(prompts + completions)
            self._telemetry.end(record, 200, prompts, completions)

        generation.ended = ended
        return generation

    async def _start(
        self, body: CompletionBody | ChatBody, caller: Caller, record: RequestRecord, admission: Admission
    ) -> Generation:
        sampling = body.sampling_params()
        n = body.candidates
        chat = isinstance(body, ChatBody)
        count = 1 if chat else len(body.prompts())
        if count * n > self.limits.max_choices:
            raise invalid(
                "prompt" if n == 1 else "n" if n == body.n else "best_of",
                f"{count} prompts x {n} are over the limit of {self.limits.max_choices} completions",
            )
        if unknown := [token for token, _ in sampling.logit_bias if token >= self.tokenizer.vocab_size]:
            raise invalid(
                "logit_bias",
                f"logit_bias names token {unknown[0]} but {self.tokenizer.name} has {self.tokenizer.vocab_size}",
            )
        template = ""
        if isinstance(body, ChatBody):
            adapter = await self.resolve(body.model, caller, record)
            prompt, template = await self.chat_prompts.encode(body, adapter, caller)
            prompts = [prompt]
        else:
            encode = self.directory.in_text_pool(self._prompts, body)
            adapter, prompts = await asyncio.gather(self.resolve(body.model, caller, record), encode)
        if (wanted := body.wanted()) is not None:
            await self.directory.in_text_pool(partial(check_grammar, wanted.grammar, wanted.param))
        lengths = [
            check_length(
                len(prompt),
                sampling.max_tokens,
                self.max_model_len,
                "messages" if chat else "prompt",
                body.max_tokens_field,
            )
            for prompt in prompts
        ]
        prompt_tokens = sum(map(len, prompts))
        await admission.charge(prompt_tokens, n * (sum(lengths) - prompt_tokens))
        request_id = record.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        record.choices = len(prompts) * n
        streams: list[AsyncGenerator[GenerationChunk]] = []
        for number, prompt in enumerate(prompts):
            for sample in range(n):
                place, chosen = f"{request_id}-{number * n + sample}", _nth_sample(sampling, sample)
                request = row(place, prompt, adapter, caller, body.user, sampling=chosen)
                streams.append(self.recorded(request, body.model, caller, record))
        echoes = (
            await self.directory.in_text_pool(self._echoes, body, prompts)
            if isinstance(body, CompletionBody) and body.echo
            else []
        )
        asked = body.n or 1
        generation = Generation(
            request_id,
            int(time.time()),
            body.model,
            streams,
            n=n,
            kept=None if asked == n else asked,
            fingerprint=self._fingerprint if adapter is None else f"{self._fingerprint}_{adapter.digest[:10]}",
            echoes=[echo for echo in echoes for _ in range(asked)],
            token_bytes=self.tokenizer.token_bytes,
            tool_format=tool_format(self._tool_form, template),
        )
        try:
            await generation.begin()
        except InvalidRequest as error:
            if wanted is None or error.param != "grammar":
                raise
            raise invalid(wanted.param, str(error), code=error.code) from error  # what the client calls it
        return generation

    async def models(self, caller: Caller) -> dict[str, Any]:
        """The base model and every adapter that has a name, as OpenAI's list, as far as the caller may use them."""
        names = await self.directory.names_for(caller)
        base = [self._base_object()] if caller.tenant.base_model else []
        return model_list([*base, *map(self._adapter_object, names)])

    async def model(self, name: str, caller: Caller) -> dict[str, Any]:
        """One model. Raises AdapterNotFound and what looking it up raises."""
        adapter = await self.directory.resolve(name, caller)
        return self._base_object() if adapter is None else self._adapter_object(name)

    def close(self) -> None:
        """Give threads, processes and connections back."""
        self.chat_prompts.close()
        self.directory.close()

    async def recorded(
        self, request: GenerationRequest, model: str, caller: Caller, record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        """The chunks of one row."""
        try:
            async with aclosing(self._generate(request, model, caller, record)) as chunks:
                async for chunk in chunks:
                    record.saw(chunk)
                    yield chunk
        except Exception as error:
            record.error = from_exception(error).code or type(error).__name__
            raise

    async def _generate(
        self, request: GenerationRequest, model: str, caller: Caller, record: RequestRecord
    ) -> AsyncGenerator[GenerationChunk]:
        """The fleet's chunks; an adapter published anew since it was looked up is looked up once more."""
        started = False
        try:
            async with aclosing(self._generator.generate(request, model, record)) as chunks:
                async for chunk in chunks:
                    started = True
                    yield chunk
            return
        except AdapterChanged:
            if started:
                raise
        adapter = await self.directory.resolve(model, caller, gone=request.adapter_digest)
        if adapter is not None:
            request = replace(request, adapter=str(adapter.ref), adapter_digest=adapter.digest)
            record.adapter = adapter.digest
        async with aclosing(self._generator.generate(request, model, record)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def resolve(self, model: str, caller: Caller, record: RequestRecord) -> ResolvedAdapter | None:
        """The content that a model's name means to the caller; None for the base model."""
        adapter = await self.directory.resolve(model, caller)
        record.model = MARK if Merge.is_meant(model) else model  # clients make up as many merges as they like
        record.adapter = "" if adapter is None else adapter.digest
        return adapter

    def _prompts(self, body: CompletionBody) -> list[list[int]]:
        most = self.max_model_len
        return [self.tokenizer.encode(p, most_tokens=most) if isinstance(p, str) else p for p in body.prompts()]

    def _echoes(self, body: CompletionBody, prompts: Sequence[Sequence[int]]) -> list[Echo]:
        echoes = []
        for prompt, ids in zip(body.prompts(), prompts, strict=True):
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            tokens = ids if body.echoes_logprobs else ()
            stream = TextStream(self.tokenizer)  # special tokens are not part of the text
            lengths = [len(stream.push(token)) for token in tokens]
            names = tuple(map(self.tokenizer.token_text, tokens))
            echoes.append(Echo(text, names, tuple(accumulate(lengths[:-1], initial=0)) if names else ()))
        return echoes

    def _base_object(self) -> dict[str, Any]:
        return model_object(self.base_model, self._started, root=self._folder.name)

    def _adapter_object(self, name: str) -> dict[str, Any]:
        return model_object(name, self._started, root=name, parent=self.base_model)


def row(
    request_id: str,
    prompt: Sequence[int],
    adapter: ResolvedAdapter | None,
    caller: Caller,
    user: str | None,
    *,
    sampling: SamplingParams | None = None,
    pooling: Pooling | None = None,
) -> GenerationRequest:
    """What an engine is asked, for this caller. user: OpenAI's field."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=sampling or SamplingParams(),
        adapter=None if adapter is None else str(adapter.ref),
        adapter_digest=None if adapter is None else adapter.digest,
        tenant=caller.counts_as(user),
        share=caller.tenant.weight,
        api_token=None if adapter is None else caller.token_for(adapter.name),
        pooling=pooling,
    )


def _content_hash(model_folder: Path) -> str:
    """Of the small files that say what the model is; its weights are too large to read for this."""
    files = sorted(model_folder.glob("*.json")) + sorted(model_folder.glob("*.jinja"))
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:10]


def _nth_sample(sampling: SamplingParams, sample: int) -> SamplingParams:
    """A seed asks for n different samples that are the same every time, not for n copies."""
    if sample == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + sample) % 2**63)

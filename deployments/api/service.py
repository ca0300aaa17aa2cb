"""From a validated request to running generations: one path for HTTP and for handle calls."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from adapter_store.errors import AdapterChanged
from adapter_store.source import ResolvedAdapter
from deployments.adapters.directory import AdapterDirectory
from deployments.api.generation import Generation
from deployments.api.tool_formats import tool_format
from deployments.fleet import Generator
from deployments.protocol.chat import ChatBody
from deployments.protocol.completions import CompletionBody
from deployments.protocol.errors import from_exception, invalid
from deployments.protocol.models import model_list, model_object
from engine.grammar import check_grammar
from engine.request import GenerationChunk, GenerationRequest, InvalidRequest, Pooling, SamplingParams, check_length
from engine.spec import ModelSpec
from engine.tokenizer import Tokenizer

Observer = Callable[[str, int, int, int], None]


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
        observe: Observer | None = None,
        tool_form: str | None = None,
    ) -> None:
        """max_model_len: most tokens of a prompt and its completion together, as the engines have it. observe: told of
        each request that ended: the model's name (empty when there is none of this name), HTTP status, tokens of its
        prompts and completions. tool_form: how the model writes down calls, see ``tool_formats``; None finds out.

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
        self._observe = observe
        self._started = int(time.time())
        self._tool_format = tool_format(tool_form, self.tokenizer.template.text)
        self._fingerprint = f"fp_{_content_hash(model_folder)}"

    async def start(self, body: CompletionBody | ChatBody, *, stream: bool) -> Generation:
        """Begin to generate: on return every choice has its first chunk, or without ``stream`` its only one.

        Raises ApiError, InvalidRequest, EngineOverloaded, an AdapterError or ReplicaLost; nothing runs on then.
        """
        with self.failures() as known:
            return await self._start(body, stream=stream, known=known)

    @contextmanager
    def failures(self) -> Iterator[list[str]]:
        """Around what may fail before there is an answer, to observe it. Gives a list that takes the model's name once
        it is known that there is such a model."""
        known: list[str] = []
        try:
            yield known
        except Exception as error:
            if self._observe is not None:
                self._observe("".join(known), from_exception(error).status, 0, 0)
            raise

    async def begin(self, generation: Generation) -> None:
        """Wait until all of it has begun, and observe its end. Raises what ``Generation.begin`` does."""
        await generation.begin()
        if (observe := self._observe) is not None:
            generation.ended = lambda prompts, completions: observe(generation.model, 200, prompts, completions)

    async def encode(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        """The token ids that each of its prompts is. Raises InvalidRequest."""
        return await self.directory.in_text_pool(self._prompts, body)

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        adapter: ResolvedAdapter | None,
        user: str | None,
        sampling: SamplingParams | None = None,
        pooling: Pooling | None = None,
    ) -> GenerationRequest:
        """One row, for who asks."""
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=sampling or SamplingParams(),
            adapter=None if adapter is None else str(adapter.ref),
            adapter_digest=None if adapter is None else adapter.digest,
            tenant=user or "",
            pooling=pooling,
        )

    async def _start(self, body: CompletionBody | ChatBody, *, stream: bool, known: list[str]) -> Generation:
        """known: takes the model's name once it is known that there is such a model."""
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
        adapter, prompts = await asyncio.gather(self.resolve(body.model, known), self.encode(body))
        if (wanted := body.wanted()) is not None:
            await self.directory.in_text_pool(partial(check_grammar, wanted.grammar, wanted.param))
        for prompt in prompts:
            check_length(
                len(prompt),
                sampling.max_tokens,
                self.max_model_len,
                "messages" if chat else "prompt",
                body.max_tokens_field,
            )
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        streams: list[AsyncGenerator[GenerationChunk]] = []
        for number, prompt in enumerate(prompts):
            for sample in range(n):
                place = f"{request_id}-{number * n + sample}"
                request = self.request(place, prompt, adapter, body.user, _nth_sample(sampling, sample))
                streams.append(self.generate(request, body.model, whole=not stream))
        echoes = (
            await self.directory.in_text_pool(self._echoes, body)
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
            echoes=[text for text in echoes for _ in range(asked)],
            token_bytes=self.tokenizer.token_bytes,
            tool_format=self._tool_format,
        )
        try:
            await self.begin(generation)
        except InvalidRequest as error:
            if wanted is None or error.param != "grammar":
                raise
            raise invalid(wanted.param, str(error), code=error.code) from error  # what the client calls it
        return generation

    async def models(self) -> dict[str, Any]:
        """The base model and every adapter that has a name, as OpenAI's list."""
        names = await self.directory.names()
        return model_list([self._base_object(), *map(self._adapter_object, names)])

    async def model(self, name: str) -> dict[str, Any]:
        """One model. Raises AdapterNotFound and what looking it up raises."""
        if name == self.base_model:
            return self._base_object()
        await self.directory.resolve(name)
        return self._adapter_object(name)

    def close(self) -> None:
        """Give threads and connections back."""
        self.directory.close()

    async def generate(self, request: GenerationRequest, model: str, *, whole: bool) -> AsyncGenerator[GenerationChunk]:
        """The fleet's chunks; an adapter published anew since it was looked up is looked up once more."""
        started = False
        try:
            async with aclosing(self._generator.generate(request, model, whole=whole)) as chunks:
                async for chunk in chunks:
                    started = True
                    yield chunk
            return
        except AdapterChanged:
            if started:
                raise
        adapter = await self.directory.resolve(model, gone=request.adapter_digest)
        if adapter is not None:
            request = replace(request, adapter=str(adapter.ref), adapter_digest=adapter.digest)
        async with aclosing(self._generator.generate(request, model, whole=whole)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def resolve(self, model: str, known: list[str]) -> ResolvedAdapter | None:
        """The content that a model's name means now; None for the base model. known: see ``failures``."""
        adapter = await self.directory.resolve(model)
        known.append(model)
        return adapter

    def _prompts(self, body: CompletionBody | ChatBody) -> list[list[int]]:
        most = self.max_model_len
        if isinstance(body, ChatBody):
            return [self.tokenizer.encode_chat(body.plain_messages(), most, **body.template_arguments())]
        return [self.tokenizer.encode(p, most_tokens=most) if isinstance(p, str) else p for p in body.prompts()]

    def _echoes(self, body: CompletionBody) -> list[str]:
        return [p if isinstance(p, str) else self.tokenizer.decode(p) for p in body.prompts()]

    def _base_object(self) -> dict[str, Any]:
        return model_object(self.base_model, self._started, root=self._folder.name)

    def _adapter_object(self, name: str) -> dict[str, Any]:
        return model_object(name, self._started, root=name, parent=self.base_model)


def _content_hash(model_folder: Path) -> str:
    """Of the small files that say what the model is; its weights are too large to read for this."""
    files = sorted(model_folder.glob("*.json")) + sorted(model_folder.glob("*.jinja"))
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:10]


def _nth_sample(sampling: SamplingParams, sample: int) -> SamplingParams:
    """A seed asks for n different samples that are the same every time, not for n copies."""
    if sample == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + sample) % 2**63)

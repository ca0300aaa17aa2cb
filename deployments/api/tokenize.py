"""``/tokenize`` and ``/detokenize`` over a ``CompletionService``: what a prompt is to the model, and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from adapter_store.source import ResolvedAdapter
from deployments.api.openapi import GENERATES, answers
from deployments.api.service import CompletionService
from deployments.protocol.answers import Tokens, TokensText
from deployments.protocol.errors import invalid
from deployments.protocol.tokenize import DetokenizeBody, TokenizeBody, tokenized
from deployments.tenants.caller import Caller, CallerOf


def add_tokenize_routes(app: FastAPI, service: CompletionService) -> None:
    """The endpoints, behind the app's own limits and error envelope."""
    in_pool, tokenizer = service.directory.in_text_pool, service.tokenizer

    @asynccontextmanager
    async def admitted(caller: Caller, model: str | None) -> AsyncGenerator[ResolvedAdapter | None]:
        """Such a request counts as one, of no tokens: they are the model's, and it has nothing to do with it."""
        async with service.admissions.admitted(caller) as admission:
            yield None if model is None else await service.directory.resolve(model, caller)
            admission.leave(0)

    @app.post("/tokenize", response_model=None, responses=answers(Tokens, *GENERATES))
    async def tokenize(body: TokenizeBody, caller: CallerOf) -> dict[str, Any]:
        """A prompt whose bytes alone show that no context holds it is refused, as it would be everywhere else."""
        async with admitted(caller, body.model) as adapter:
            if body.prompt is None:
                tokens, _ = await service.chat_prompts.encode(body.chat(service.base_model), adapter, caller)
            else:
                tokens = await in_pool(_encode, service, body.prompt, body.add_special_tokens is not False)
            spelled = await in_pool(tokenizer.spelled, tokens) if body.return_token_strs else None
        return tokenized(tokens, service.max_model_len, spelled)

    @app.post("/detokenize", response_model=None, responses=answers(TokensText, *GENERATES))
    async def detokenize(body: DetokenizeBody, caller: CallerOf) -> dict[str, str]:
        """Special tokens included, so that the text is the same prompt again."""
        if unknown := next((token for token in body.tokens if token >= tokenizer.vocab_size), None):
            raise invalid("tokens", f"tokens holds {unknown} but {tokenizer.name} has {tokenizer.vocab_size}")
        async with admitted(caller, body.model):
            return {"prompt": await in_pool(_decode, service, body.tokens)}


def _encode(service: CompletionService, text: str, add_special_tokens: bool) -> list[int]:
    return service.tokenizer.encode(
        text, add_special_tokens=add_special_tokens, most_tokens=service.max_model_len, param="prompt"
    )


def _decode(service: CompletionService, tokens: list[int]) -> str:
    return service.tokenizer.decode(tokens, skip_special_tokens=False)

"""Chats as token ids, written with the base model's template or with one that the adapter ships."""

from __future__ import annotations

import asyncio
import threading
from hashlib import sha256
from typing import Any

from adapter_store.errors import AdapterRefused
from adapter_store.failures import RecentFailures
from adapter_store.fair_threads import FairThreads
from adapter_store.references import owner_of
from adapter_store.source import ResolvedAdapter
from adapter_store.template_files import Templates
from deployments.adapters.directory import AdapterDirectory
from deployments.protocol.chat import ChatBody
from deployments.tenants.caller import Caller
from engine.chat_template import BadTemplate
from engine.template_process import TemplateProcess
from engine.tokenizer import Tokenizer

PROCESSES = 4  # of about 25 MB, each started when it is needed
_SHARE = 2  # of them that one owner's chats may take at once
REFUSED_SECONDS = 30.0  # how long a template that went wrong for a tenant is not tried again for it; another text is


class ChatPrompts:
    """Adapters' templates are rendered in processes of their own, shared so that one owner's slow ones leave some for
    the others."""

    def __init__(self, tokenizer: Tokenizer, directory: AdapterDirectory, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._directory = directory
        self._max_model_len = max_model_len
        self._threads = FairThreads(PROCESSES, _SHARE, "templates")
        self._own = threading.local()
        self._processes: list[TemplateProcess] = []
        self._failures = RecentFailures(REFUSED_SECONDS)

    async def encode(self, body: ChatBody, adapter: ResolvedAdapter | None, caller: Caller) -> tuple[list[int], str]:
        """The prompt, and the text of the template that it was written with. ``adapter`` is resolved for the caller.

        Raises InvalidRequest for messages that the template refuses; AdapterRefused for a template that cannot be
        read, does not compile or takes too much; AdapterNotFound or AdapterUnavailable where it cannot be had.
        """
        templates = {} if adapter is None else await self._directory.templates(adapter, caller)
        messages, options, most = body.plain_messages(), body.template_arguments(), self._max_model_len
        in_pool, tokenizer = self._directory.in_text_pool, self._tokenizer
        # Many adapters were saved with a copy of the base model's, which is trusted.
        if adapter is None or not templates or templates == tokenizer.template.sources:
            ids = await in_pool(lambda: tokenizer.encode_chat(messages, most, **options))
            return ids, tokenizer.template.text
        text = await self._render(adapter, templates, messages, options, caller.tenant.name)
        return await in_pool(tokenizer.encode_rendered, text, most), "\n".join(templates.values())

    def close(self) -> None:
        """End the processes."""
        self._threads.close()
        for process in self._processes:
            process.close()

    async def _render(
        self,
        adapter: ResolvedAdapter,
        templates: Templates,
        messages: list[dict[str, Any]],
        options: dict[str, Any],
        tenant: str,
    ) -> str:
        # By tenant, for it may be the messages that make a template take too much.
        tried = (tenant, adapter.ref.unpinned, sha256(repr(templates).encode("utf-8", "surrogatepass")).digest())
        self._failures.check(tried, adapter.name)

        def render() -> str:
            tokens = self._tokenizer.special_tokens
            return self._process().render(templates, tokens, adapter.name, messages, options)

        try:
            return await asyncio.wrap_future(self._threads.submit(owner_of(adapter.ref), render))
        except BadTemplate as error:
            refused = AdapterRefused(adapter.name, f"its chat template {error}")
            self._failures.add(tried, refused)
            raise refused from None

    def _process(self) -> TemplateProcess:
        """This thread's."""
        if not hasattr(self._own, "process"):
            self._own.process = TemplateProcess()
            self._processes.append(self._own.process)
        return self._own.process

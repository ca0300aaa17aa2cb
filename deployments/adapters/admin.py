"""What an operator can do to adapters while the application runs. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import AdapterError
from adapter_store.names import NamedAdapter
from adapter_store.references import parse_reference
from adapter_store.schemes import scheme_mistake
from adapter_store.source import ResolvedAdapter
from deployments.adapters.directory import AdapterDirectory, Feed
from deployments.protocol.adapters import adapter_object
from deployments.protocol.errors import ApiError, about_reference, invalid
from deployments.replicas import Replicas

# No colon: references have one, and so have actions such as ``name:pin``.
_NAME = re.compile(r"[A-Za-z0-9_][\w .@+/-]{0,254}", re.ASCII)
MARGIN_SECONDS = 10.0  # for replicas to answer, beyond what they were told to wait
MAX_WAIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Added:
    """The outcome of a declaration. new: it was not declared before."""

    adapter: dict[str, Any]
    new: bool


class AdapterAdmin:
    """One gateway's orders. Every method raises ApiError, an AdapterError or ReplicaLost."""

    def __init__(self, directory: AdapterDirectory, feed: Feed, replicas: Replicas, load_seconds: float) -> None:
        """load_seconds: how long an adapter may take to come from its source."""
        self._directory = directory
        self._feed = feed
        self._replicas = replicas
        self._load_seconds = load_seconds

    async def page(self, after: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Up to ``limit`` adapters whose names come after ``after``, and whether there are more. Asks no source:
        a digest is told when it was looked up before."""
        names, held = await asyncio.gather(self._directory.names(), self._held())
        names = [name for name in names if name > after]
        shown = await self._directory.in_text_pool(self._describe_all, names[:limit], held)
        return shown, len(names) > limit

    async def get(self, name: str) -> dict[str, Any]:
        """One adapter, looked up now. For one that is listed it is told in ``reason`` why it cannot be loaded."""
        named = await self._directory.named(name)
        reason = None
        try:
            await self._directory.content(named)
        except AdapterError as error:
            if named.origin == "reference":  # nobody declared it, so it is not there
                raise
            reason = error.reason
        return {**self._describe(named, await self._held()), "reason": reason}

    async def declare(self, name: str, reference: str, *, pinned: bool = False, replace: bool = False) -> Added:
        """Have ``name`` stand for ``reference`` everywhere, once a replica could load it whole.

        Saying the same again is no error; another reference for a name needs ``replace``.
        """
        self._check_name(name)
        try:
            ref = self._directory.catalog.rooted(parse_reference(reference))
        except ValueError as error:
            raise invalid("reference", str(error)) from error
        if (mistake := scheme_mistake(ref.source)) is not None:
            raise invalid("reference", f"reference {ref}: {mistake}")
        known = await self._known(name)
        if known is not None and (known.origin != "runtime" or (known.ref != ref and not replace)):
            raise _exists(known)
        named = NamedAdapter(name, ref, "runtime")
        try:
            await self._load(await self._directory.content(named))
        except AdapterError as error:
            raise about_reference(error, str(ref)) from error
        await self._feed.declare(name, reference=str(ref))
        if pinned:
            try:
                await self.pin(name)
            except Exception:
                if known is None:
                    await self._feed.declare(name, reference=None)
                raise
        return Added(self._describe(named, await self._held()), new=known is None)

    async def remove(self, name: str, wait_s: float = 0.0) -> None:
        """Forget a name that was declared at run time, and free what every replica keeps of it.

        New requests are turned away at once; those in flight have ``wait_s`` seconds to end. When some still run then
        (or run now, with no time to wait) nothing is removed: 409.
        """
        if not 0 <= wait_s <= MAX_WAIT_SECONDS:
            raise invalid("wait_s", f"wait_s is {wait_s:g} but must be between 0 and {MAX_WAIT_SECONDS:g} seconds")
        named = await self._directory.named(name)
        if named.origin != "runtime":
            raise ApiError(
                409,
                f"adapter {name!r} is not declared at run time: remove it where it is "
                + {"configured": "configured, under adapters", "folder": "kept, in its adapter folder"}.get(
                    named.origin, "allowed, under allow"
                ),
                code="not_removable",
            )
        digest = await self._digest(named)
        if digest is not None and await self._means_the_same(named, digest):
            digest = None  # nothing to free: another name still stands for it
        if digest is not None and not wait_s and (running := _requests(await self._held(), digest)):
            raise _in_use(name, running)
        was = self._feed.known.get(name)
        await self._feed.declare(name, reference=None, pinned=False)
        if digest is None:
            return
        try:
            answers = await self._everywhere("unload", digest, wait_s, timeout_s=wait_s + MARGIN_SECONDS)
            in_use = [answer for answer in answers if answer.get("result") is False]
        except BaseException:
            await self._feed.declare(name, reference=was.reference, pinned=was.pinned)
            raise
        if in_use:
            await self._feed.declare(name, reference=was.reference, pinned=was.pinned)
            raise _in_use(name, _requests(await self._held(), digest))

    async def prefetch(self, name: str) -> dict[str, Any]:
        """Load the adapter on the replica that its requests go to."""
        named = await self._directory.named(name)
        await self._load(await self._directory.content(named))
        return self._describe(named, await self._held())

    async def pin(self, name: str) -> dict[str, Any]:
        """Keep the adapter in a slot of every replica, also of those that start later."""
        named = await self._directory.named(name)
        await self._load(await self._directory.content(named))
        was = self._feed.known.get(name).pinned
        await self._feed.declare(name, pinned=True)
        answers = await self._everywhere("settle_pins", timeout_s=self._load_seconds + MARGIN_SECONDS)
        failed = {answer["replica"]: answer["result"][name] for answer in answers if name in answer.get("result", {})}
        if failed:
            if not was:
                await self._feed.declare(name, pinned=False)
            replica, reason = next(iter(failed.items()))
            raise ApiError(409, f"adapter {name!r} cannot be pinned on replica {replica}: {reason}", code="not_pinned")
        return self._describe(named, await self._held())

    async def unpin(self, name: str) -> dict[str, Any]:
        """Let the adapter leave its slots again when others need them. It stays there until then."""
        if self._feed.known.get(name).pinned:
            await self._feed.declare(name, pinned=False)
            await self._everywhere("settle_pins", timeout_s=MARGIN_SECONDS)
        named = await self._directory.named(name)
        return self._describe(named, await self._held())

    async def refresh(self, name: str) -> dict[str, Any]:
        """Look at the source now. New content is loaded before new requests get it; running ones end on the old."""
        named = await self._directory.named(name)
        before = self._directory.catalog.known_digest(named.ref)
        self._directory.catalog.forget(named.ref)
        resolved = await self._directory.content(named)
        held = await self._held()
        if resolved.digest != before and any(before in one["slots"] or before in one["host"] for one in held.values()):
            await self._load(resolved)
        known = self._feed.known.get(name)
        await self._feed.declare(name, refreshes=known.refreshes + 1)
        if known.pinned:
            await self._everywhere("settle_pins", timeout_s=self._load_seconds + MARGIN_SECONDS)
        return {**self._describe(named, await self._held()), "previous_digest": before}

    # ------------------------------------------------------------------------------------------------------

    def _check_name(self, name: str) -> None:
        if name == self._directory.base_model:
            raise ApiError(409, f"{name!r} is the base model's name: choose another", param="name", code="name_taken")
        if not _NAME.fullmatch(name):
            raise invalid(
                "name", f"name is {name!r}: letters, digits, spaces and any of _ . @ + / - , at most 255, no colon"
            )

    async def _known(self, name: str) -> NamedAdapter | None:
        if not self._feed.heard:
            await self._feed.wait_heard()
        try:
            return await self._directory.named(name)
        except AdapterError:
            return None

    async def _load(self, resolved: ResolvedAdapter) -> None:
        await self._replicas.home("prefetch", resolved.name, resolved.digest, str(resolved.ref), resolved.digest)

    async def _digest(self, named: NamedAdapter) -> str | None:
        """What the name was last found to mean; None when its source does not tell and it was never asked before."""
        known = self._directory.catalog.known_digest(named.ref)
        if known is not None:
            return known
        try:
            return (await self._directory.content(named)).digest
        except AdapterError:
            return None

    async def _means_the_same(self, named: NamedAdapter, digest: str) -> bool:
        """Whether another name is known to stand for the same content, so that it is still wanted."""

        def look() -> bool:
            catalog = self._directory.catalog
            others = [name for name in catalog.names() if name != named.name]
            return any(catalog.known_digest(catalog.find(name)) == digest for name in others)

        return await self._directory.in_text_pool(look)

    async def _held(self) -> dict[str, dict[str, Any]]:
        """What each replica holds, by replica."""
        answers = await self._everywhere("held")
        return {answer["replica"]: answer["result"] for answer in answers if "result" in answer}

    async def _everywhere(self, method: str, *args: Any, timeout_s: float = MARGIN_SECONDS) -> list[dict[str, Any]]:
        return await self._replicas.every(method, *args, timeout_s=timeout_s)

    def _describe_all(self, names: Sequence[str], held: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        shown = []
        for name in names:
            try:
                shown.append(self._describe(self._directory.catalog.named(name), held))
            except AdapterError:  # its folder went away meanwhile
                continue
        return shown

    def _describe(self, named: NamedAdapter, held: dict[str, dict[str, Any]]) -> dict[str, Any]:
        declared = self._feed.known.get(named.name)
        digest = self._directory.catalog.known_digest(named.ref)
        return adapter_object(named, digest, held, pinned=declared.pinned)


def _requests(held: dict[str, dict[str, Any]], digest: str) -> int:
    return sum(one["requests"].get(digest, 0) for one in held.values())


def _in_use(name: str, running: int) -> ApiError:
    return ApiError(
        409,
        f"adapter {name!r} is used by {running} requests: try again later, or let wait_s seconds pass for them to end",
        code="adapter_in_use",
    )


def _exists(known: NamedAdapter) -> ApiError:
    where, remedy = {
        "configured": ("configured", "change it there, or choose another name"),
        "folder": ("in an adapter folder", "change it there, or choose another name"),
    }.get(known.origin, ("declared at run time", "set replace to true to let it stand for something else"))
    message = f"adapter {known.name!r} exists already, {where} as {known.ref}: {remedy}"
    return ApiError(409, message, param="replace" if known.origin == "runtime" else None, code="adapter_exists")

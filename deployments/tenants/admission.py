"""A gateway's side of limits: asks the register before a request is worked on, and tells it when it has ended."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError

from deployments.background import end
from deployments.protocol.errors import ApiError, invalid
from deployments.tenants.caller import Caller
from deployments.tenants.ledger import WINDOW_SECONDS, Entry, Quota, Verdict
from deployments.tenants.tenant import Limits

CONFIRM_SECONDS = 1.0
PATIENCE_SECONDS = 8.0  # how long a request waits for a register that does not answer
RETRY_SECONDS = 0.2

logger = logging.getLogger("ray.serve")


class Admission:
    """One request that was let in. One whose sender has no limits costs nothing and asks nobody."""

    def __init__(self, desk: Admissions | None = None, caller: Caller | None = None) -> None:
        self._desk = desk
        self._caller = caller
        self.limits = Limits() if caller is None else caller.tenant.limits
        self.tenant = "" if caller is None else caller.tenant.name
        self.lease = uuid.uuid4().hex
        self.granted = False
        self.prompt = 0
        self.since = time.monotonic()
        self.tokens = 0
        self.charged_at: float | None = None
        self.left_at: float | None = None

    async def charge(self, prompt: int, completion: int) -> None:
        """Set aside the tokens that the request may use at most. Raises ApiError: 429, or 400 when they are more than
        the tenant may ever use in a minute."""
        self.prompt, tokens = prompt, prompt + completion
        if self._desk is not None and self.limits.tokens_per_minute is not None:
            assert self._caller is not None
            verdict = await self._desk.ask("charge", self, tokens)
            judge(verdict, self._caller, tokens)
            self.tokens, self.charged_at = tokens, time.monotonic()

    def leave(self, tokens: int) -> None:
        """The request has ended, and used so many tokens. A second call does nothing."""
        if self._desk is not None and self.left_at is None:
            self.left_at, self.tokens = time.monotonic(), tokens
            self._desk.tell_left(self)

    def entry(self, now: float) -> Entry:
        """What a register is told that does not know it."""
        charged = None if self.charged_at is None else now - self.charged_at
        return Entry(self.lease, self.tenant, now - self.since, self.tokens, charged, self.left_at is None)


class Admissions:
    """Where one gateway's requests are let in."""

    def __init__(self, find_register: Callable[[], Awaitable[Any]] | None = None) -> None:
        """find_register: gives the register's actor handle; called again after an error. None: there is none, and
        requests of tenants with limits are turned away."""
        self._find = find_register or _none
        self._owner = uuid.uuid4().hex
        self._register: Any = None
        self._epoch: str | None = None  # of the register that has been told what this gateway knows
        self._told: str | None = None  # the last one that was
        self._introducing = asyncio.Lock()
        self._known: dict[str, Admission] = {}  # that run, or count still
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def admitted(self, caller: Caller) -> AsyncGenerator[Admission]:
        """Around the beginning of a request. One that fails has left, one that is cancelled has used its prompt; one
        that goes on leaves by itself."""
        admission = await self.enter(caller)
        try:
            yield admission
        except BaseException as error:
            admission.leave(0 if isinstance(error, Exception) else admission.prompt)
            raise

    async def enter(self, caller: Caller) -> Admission:
        """Let a request in. Raises ApiError: 429 when a limit is reached, 503 when that cannot be known."""
        if not caller.tenant.limits:
            return Admission()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._confirm())
        admission = Admission(self, caller)
        self._known[admission.lease] = admission
        try:
            judge(await self.ask("enter", admission, admission.tenant), caller)
            admission.granted, admission.since = True, time.monotonic()
        except BaseException as error:
            if isinstance(error, ApiError) and error.status == 429:
                del self._known[admission.lease]  # it was not let in, and counts for nothing
            else:
                admission.leave(0)
            raise
        return admission

    async def ask(self, method: str, admission: Admission, what: Any) -> Verdict:
        """A verdict on one request. Raises ApiError 503."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                    register = await self._introduced()
                    asked = (self._owner, self._epoch, admission.lease, what, admission.limits)
                    verdict = await getattr(register, method).remote(*asked)
                if verdict is not None:
                    return verdict
                self._epoch = None
            except (RayError, ValueError, TimeoutError) as error:
                self._register = self._epoch = None
                if time.monotonic() > deadline:
                    logger.error("limits cannot be counted now: %s", error)
                    raise ApiError(
                        503,
                        "this server cannot count what you use at the moment: try again",
                        kind="server_error",
                        code="limits_unavailable",
                        headers={"Retry-After": "1"},
                    ) from None
                await asyncio.sleep(RETRY_SECONDS)

    def tell_left(self, admission: Admission) -> None:
        """Give the place of a request back. Never waits: what gets lost is made good by the next confirmation."""
        if self._register is not None:
            self._register.leave.remote(self._owner, admission.lease, admission.tokens)

    async def close(self) -> None:
        """Confirm no more."""
        await end(self._task)

    async def _introduced(self) -> Any:
        """The register, once it knows what this gateway was let do."""
        async with self._introducing:
            if self._register is None:
                self._register = await self._find()
            if self._epoch is None:
                now = time.monotonic()
                entries = [one.entry(now) for one in self._known.values() if one.granted]
                self._epoch = self._told = await self._register.introduce.remote(self._owner, self._told, entries)
            return self._register

    async def _confirm(self) -> None:
        """Tell the register again and again what runs, so that it can tell what does not."""
        while True:
            await asyncio.sleep(CONFIRM_SECONDS)
            now = time.monotonic()
            old = now - WINDOW_SECONDS
            self._known = {
                lease: one
                for lease, one in self._known.items()
                if one.left_at is None or max(one.since, one.charged_at or 0.0) > old
            }
            if not self._known:
                continue
            try:
                register = await self._introduced()
                running = [lease for lease, one in self._known.items() if one.left_at is None]
                unknown = await register.confirm.remote(self._owner, self._epoch, running)
                if unknown is None or any(self._known[lease].granted for lease in unknown):
                    self._epoch = None  # it gave them up while this gateway was silent: it is told again
            except (RayError, ValueError) as error:
                logger.info("the register of tenants does not answer: %s", error)
                self._register = self._epoch = None


def judge(verdict: Verdict, caller: Caller, tokens: int = 0) -> None:
    """Tell the caller what is left, in OpenAI's headers. Raises ApiError for a refusal."""
    for kind, quota in (("requests", verdict.requests), ("tokens", verdict.tokens)):
        if quota is not None:
            caller.headers |= _headers(kind, quota)
    limits = caller.tenant.limits
    if verdict.refused is None:
        return
    if verdict.refused == "never":
        raise invalid(
            "max_tokens",
            f"the request may use {tokens} tokens, prompt and completions together, but you may use "
            f"{limits.tokens_per_minute} a minute: set max_tokens (lower), or send less at once",
            code="tokens_limit_exceeded",
        )
    reached = {
        "requests": f"{limits.requests_per_minute} requests a minute",
        "tokens": f"{limits.tokens_per_minute} tokens a minute",
        "concurrency": f"{limits.concurrency} requests at once",
    }[verdict.refused]
    seconds = math.ceil(verdict.retry_after_s)
    raise ApiError(
        429,
        f"rate limit reached: {reached}; try again in {seconds} s",
        kind=verdict.refused,
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds), "retry-after-ms": str(math.ceil(verdict.retry_after_s * 1000))},
    )


def _headers(kind: str, quota: Quota) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": str(quota.limit),
        f"x-ratelimit-remaining-{kind}": str(quota.remaining),
        f"x-ratelimit-reset-{kind}": f"{quota.reset_s:.3f}s",
    }


async def _none() -> Any:
    raise ValueError("there is no register of tenants")

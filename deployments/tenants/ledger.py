"""How much each tenant uses: what is counted where all gateways ask, exactly.

What holds at every moment, for each tenant and the limits that its requests came with:

- a request is let in only if fewer than ``requests_per_minute`` were let in within the last 60 seconds, and refused
  for that reason only if so many were;
- a request gets its tokens only if they and those of the requests that got theirs within the last 60 seconds come to
  no more than ``tokens_per_minute``, and is refused for that reason only if they come to more. Until a request ends
  what counts is what it may use at most, afterwards what it used;
- a request is let in only if fewer than ``concurrency`` run, and refused for that reason only if so many do.

These are sliding windows, not buckets: a bucket of the same rate lets nearly twice as many through in some minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from deployments.tenants.tenant import Limits

WINDOW_SECONDS = 60.0
OWNER_SECONDS = 10.0  # a gateway that is silent for so long is gone, and what it let in runs no more
LATE_SECONDS = 5.0  # how old a lease must be before its gateway's not naming it means that it ended

Reason = Literal["requests", "tokens", "concurrency", "never"]


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit: its size, how much of it is left now, and seconds until all of it is."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """refused: which limit it was; None when none was. "never": more tokens than the limit at once. retry_after_s:
    when to come again at the latest, for as much."""

    refused: Reason | None = None
    retry_after_s: float = 0.0
    requests: Quota | None = None
    tokens: Quota | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One request as its gateway tells it to a ledger that does not know it. Ages in seconds; token_age_s None: it has
    been given no tokens."""

    lease: str
    tenant: str
    age_s: float
    tokens: int = 0
    token_age_s: float | None = None
    running: bool = True


@dataclass(slots=True, eq=False)
class _Lease:
    name: str
    tenant: str
    owner: str
    since: float
    tokens: int = 0
    charged_at: float | None = None


@dataclass(slots=True)
class _Account:
    entered: deque[float] = field(default_factory=deque)
    charged: deque[_Lease] = field(default_factory=deque)  # by when they got their tokens
    tokens: int = 0  # of those
    running: int = 0


class Ledger:
    """Not thread-safe: one event loop's. A tenant is a name; its limits come with each question, so a change of them
    counts from the next question on."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds that never go back."""
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._leases: dict[str, _Lease] = {}  # that run
        self._most_accounts = 1024
        self._owners: dict[str, float] = {}  # gateway -> when it was last heard

    def enter(self, owner: str, lease: str, tenant: str, limits: Limits) -> Verdict:
        """Let a request in, or say why not. The same lease again is the same request, and let in once."""
        now = self._heard(owner)
        account = self._account(tenant, now)
        if lease not in self._leases:
            if limits.concurrency is not None and account.running >= limits.concurrency:
                return self._verdict(account, limits, now, "concurrency", 1.0)
            if limits.requests_per_minute is not None and len(account.entered) >= limits.requests_per_minute:
                freed = account.entered[len(account.entered) - limits.requests_per_minute] + WINDOW_SECONDS
                return self._verdict(account, limits, now, "requests", freed - now)
            self._run(_Lease(lease, tenant, owner, now), account)
            account.entered.append(now)
        return self._verdict(account, limits, now)

    def charge(self, owner: str, lease: str, tokens: int, limits: Limits) -> Verdict:
        """Give a request that was let in the tokens that it may use at most, or say why not; it ends then."""
        now = self._heard(owner)
        one = self._leases[lease]
        account = self._account(one.tenant, now)
        most = limits.tokens_per_minute
        if most is not None and one.charged_at is None and account.tokens + tokens > most:
            self._end(one, 0)
            if tokens > most:
                return self._verdict(account, limits, now, "never")
            return self._verdict(
                account, limits, now, "tokens", self._wait(account, account.tokens + tokens - most, now)
            )
        if one.charged_at is None:
            one.tokens, one.charged_at = tokens, now
            account.tokens += tokens
            account.charged.append(one)
        return self._verdict(account, limits, now)

    def leave(self, owner: str, lease: str, tokens: int) -> None:
        """A request ended; ``tokens`` is what it used."""
        self._heard(owner)
        if (one := self._leases.get(lease)) is not None:
            self._end(one, tokens)

    def knows(self, lease: str) -> bool:
        """Whether the request runs, as far as this ledger knows."""
        return lease in self._leases

    def confirm(self, owner: str, running: Iterable[str]) -> list[str]:
        """All requests of a gateway that run: others of its end. Returns those that are not known here."""
        now = self._heard(owner)
        named = set(running)
        for one in [one for one in self._leases.values() if one.owner == owner and one.name not in named]:
            if now - one.since > LATE_SECONDS:
                self._end(one, one.tokens)
        return [lease for lease in named if lease not in self._leases]

    def restore(self, owner: str, entries: Iterable[Entry]) -> None:
        """Take in what a gateway was let do by a ledger that is gone."""
        now = self._heard(owner)
        for entry in entries:
            account = self._account(entry.tenant, now)
            one = _Lease(entry.lease, entry.tenant, owner, now - entry.age_s, entry.tokens)
            if entry.age_s < WINDOW_SECONDS:
                account.entered = deque(sorted([*account.entered, one.since]))
            if entry.token_age_s is not None and entry.token_age_s < WINDOW_SECONDS:
                one.charged_at = now - entry.token_age_s
                account.tokens += one.tokens
                account.charged = deque(sorted([*account.charged, one], key=lambda each: each.charged_at or 0.0))
            if entry.running:
                self._run(one, account)

    def resume(self, owner: str, entries: Iterable[Entry]) -> None:
        """Take up again what of a gateway's requests runs, and was given up here. What they were given counts still."""
        now = self._heard(owner)
        for entry in entries:
            if entry.running and entry.lease not in self._leases:
                one = _Lease(entry.lease, entry.tenant, owner, now - entry.age_s, entry.tokens)
                self._run(one, self._account(entry.tenant, now))

    def _run(self, one: _Lease, account: _Account) -> None:
        self._leases[one.name] = one
        account.running += 1

    def _heard(self, owner: str) -> float:
        now = self._clock()
        self._owners[owner] = now
        for gone in [one for one, last in self._owners.items() if now - last > OWNER_SECONDS]:
            del self._owners[gone]
            for lease in [lease for lease in self._leases.values() if lease.owner == gone]:
                self._end(lease, lease.tokens)
        return now

    def _account(self, tenant: str, now: float) -> _Account:
        """The tenant's account without what is older than the window."""
        if len(self._accounts) > self._most_accounts:  # tenants that came and went
            self._accounts = {name: one for name, one in self._accounts.items() if one.running or not _idle(one, now)}
            self._most_accounts = 2 * len(self._accounts) + 1024
        account = self._accounts.setdefault(tenant, _Account())
        while account.entered and account.entered[0] <= now - WINDOW_SECONDS:
            account.entered.popleft()
        while account.charged and (account.charged[0].charged_at or 0.0) <= now - WINDOW_SECONDS:
            account.tokens -= account.charged.popleft().tokens
        return account

    def _end(self, one: _Lease, tokens: int) -> None:
        now = self._clock()
        account = self._account(one.tenant, now)
        if one.charged_at is not None and one.charged_at > now - WINDOW_SECONDS:
            account.tokens += tokens - one.tokens
            one.tokens = tokens
        account.running -= 1
        del self._leases[one.name]

    def _wait(self, account: _Account, excess: int, now: float) -> float:
        """Seconds until ``excess`` tokens have left the window, if nobody ends before."""
        for one in account.charged:
            excess -= one.tokens
            if excess <= 0:
                return (one.charged_at or 0.0) + WINDOW_SECONDS - now
        return WINDOW_SECONDS

    def _verdict(
        self, account: _Account, limits: Limits, now: float, refused: Reason | None = None, retry_after_s: float = 0.0
    ) -> Verdict:
        requests = tokens = None
        if (most := limits.requests_per_minute) is not None:
            left = account.entered[-1] + WINDOW_SECONDS - now if account.entered else 0.0
            requests = Quota(most, max(0, most - len(account.entered)), left)
        if (most := limits.tokens_per_minute) is not None:
            last = account.charged[-1].charged_at if account.charged else None
            tokens = Quota(most, max(0, most - account.tokens), 0.0 if last is None else last + WINDOW_SECONDS - now)
        return Verdict(refused, retry_after_s, requests, tokens)


def _idle(account: _Account, now: float) -> bool:
    """Whether nothing of the account counts any more."""
    ends = [account.entered[-1]] if account.entered else []
    ends += [account.charged[-1].charged_at or 0.0] if account.charged else []
    return max(ends, default=0.0) <= now - WINDOW_SECONDS

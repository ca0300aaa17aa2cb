"""How much of the engine each tenant has had: virtual token counters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

_MOST_ABSENT = 4096  # tenants without requests whose counters are kept


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """What a token counts. input: of a prompt. output: generated. tenants: their shares, 1 for those not named."""

    input: float = 1.0
    output: float = 2.0
    tenants: Mapping[str, float] = field(default_factory=dict)


class TokenCounters:
    """A counter for each tenant that grows with the service it gets; the least counter is served next.

    After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): prompts count when they are admitted,
    tokens when they are drawn. A tenant that comes back is lifted to the least of those who wait, or, when nobody does,
    to the one served last: time away earns no credit. A tenant with a share of 2 is charged half.
    """

    def __init__(self, weights: TokenWeights) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._shares: dict[str, float] = {}  # that requests came with; kept as long as the counter
        self._level = 0.0
        self._last: str | None = None  # whose requests were the last to be served, or given up, to the last
        self._absent: OrderedDict[str, None] = OrderedDict()  # tenants that may be forgotten, the first to go first

    def __getitem__(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def __len__(self) -> int:
        return len(self._counters)

    def set_share(self, tenant: str, share: float) -> None:
        """From now on the tenant's share is this, whatever the weights say."""
        self._shares[tenant] = share

    def lift(self, tenant: str, waiting: Collection[str]) -> None:
        """The tenant comes to wait, beside those who do already; it was not one of them."""
        if self._last is not None:
            self._level = max(self._level, self[self._last])
        level = min((self[other] for other in waiting), default=self._level)
        self._counters[tenant] = max(self[tenant], level)
        self._absent.pop(tenant, None)

    def leave(self, tenant: str) -> None:
        """The tenant's last waiting request has been served or given up."""
        self._last = tenant
        self._absent[tenant] = None
        while len(self._absent) > _MOST_ABSENT:
            gone, _ = self._absent.popitem(last=False)
            self._counters.pop(gone, None)
            self._shares.pop(gone, None)

    def prompt(self, tenant: str, tokens: int) -> None:
        """A prompt of the tenant was admitted."""
        self._charge(tenant, tokens * self._weights.input)

    def drawn(self, tenant: str) -> None:
        """A token was drawn for the tenant."""
        self._charge(tenant, self._weights.output)

    def _charge(self, tenant: str, tokens: float) -> None:
        share = self._shares.get(tenant) or self._weights.tenants.get(tenant, 1.0)
        self._counters[tenant] = self[tenant] + tokens / share
        if tenant in self._absent:
            self._absent.move_to_end(tenant)

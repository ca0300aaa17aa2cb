"""How many copies a hot adapter should have, from its rows over time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deployments.routing.placement_policy import PlacementPolicy


@dataclass(slots=True)
class _Held:
    copies: int
    enough_at: float  # when there was last enough demand for all of them


class CopyCounts:
    """Copies each hot adapter holds on to: as many as asked for at once, fewer only after a quiet while.

    Without that an adapter whose rows come in bursts would gain and lose copies with every burst, and each gain is a
    load. Adapters of one copy take no memory here.
    """

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy
        self._held: dict[str, _Held] = {}

    def copies(self, adapter: str, wanted: int, replicas: int) -> int:
        """How many it should have now, when its rows ask for ``wanted``."""
        held = self._held.get(adapter)
        return wanted if held is None else max(wanted, min(held.copies, replicas))

    def saw(self, adapter: str, rows: float, step_rows: float, replicas: int, now: float) -> None:
        """A request of it was just routed, and it has that many rows now."""
        wanted = self._policy.copies_for(rows, step_rows, replicas)
        held = self._held.get(adapter)
        if held is None:
            if wanted > 1:
                self._held[adapter] = _Held(wanted, now)
        elif wanted >= held.copies:
            held.copies, held.enough_at = wanted, now
        elif self._policy.copies_for(rows / self._policy.shrink_at, step_rows, replicas) >= held.copies:
            held.enough_at = now
        elif now - held.enough_at >= self._policy.shrink_after_s:
            held.copies, held.enough_at = (held.copies + wanted) // 2, now  # by halves: hundreds are gone in a minute
            if held.copies == 1:
                del self._held[adapter]

    def keep_only(self, wanted: Callable[[str], bool]) -> None:
        """Forget adapters of which nothing is known any more."""
        self._drop(adapter for adapter in list(self._held) if not wanted(adapter))

    def _drop(self, adapters: Iterable[str]) -> None:
        for adapter in adapters:
            del self._held[adapter]

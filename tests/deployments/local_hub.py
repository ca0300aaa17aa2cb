"""The hub in this process, called as a Ray actor is."""

from __future__ import annotations

from typing import Any

from deployments.hub import FleetHub


class LocalHub:
    """``await hub.method.remote(...)`` on a real ``FleetHub``; after ``die`` every call fails as a dead actor's."""

    def __init__(self) -> None:
        self.hub = FleetHub()
        self.dead = False

    def __getattr__(self, method: str) -> Any:
        return _Remote(self, method)

    def die(self) -> None:
        self.dead = True


class _Remote:
    def __init__(self, owner: LocalHub, method: str) -> None:
        self._owner = owner
        self._method = method

    async def remote(self, *args: Any) -> Any:
        if self._owner.dead:
            raise ValueError("the actor is dead")
        answer = await getattr(self._owner.hub, self._method)(*args)
        if self._owner.dead:
            raise ValueError("the actor died meanwhile")
        return answer

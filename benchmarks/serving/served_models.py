"""What a server serves, and which of it requests name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What a server serves."""

    base: str
    adapters: tuple[str, ...]

    @classmethod
    def from_list(cls, content: dict[str, list[dict[str, str | None]]]) -> ServedModels:
        """From ``GET /v1/models``: adapters are those that name a parent. Raises ValueError without a base model."""
        base = [str(model["id"]) for model in content["data"] if not model.get("parent")]
        if not base:
            raise ValueError("the server lists no base model")
        return cls(base[0], tuple(str(model["id"]) for model in content["data"] if model.get("parent")))

    def chosen(self, count: int | None, prefix: str | None) -> list[str]:
        """Names for requests: the first ``count`` adapters, or ``prefix`` + 000 and so on; 0 is the base model alone.

        Raises ValueError when there are fewer adapters than that.
        """
        if count == 0:
            return [self.base]
        if prefix is not None:
            if count is None:
                raise ValueError("--prefix makes names by number: say how many with --adapters")
            return [f"{prefix}{number:03d}" for number in range(count)]
        if count is not None and count > len(self.adapters):
            raise ValueError(f"the server lists {len(self.adapters)} adapters, not {count}: lower --adapters")
        return list(self.adapters[:count]) or [self.base]

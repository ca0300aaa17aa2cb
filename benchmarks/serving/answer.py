"""One streamed answer as its reader saw it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Ending(StrEnum):
    """How an answer ended."""

    WHOLE = "whole"
    REFUSED = "refused"  # another status than 200
    TOLD = "told"  # an error event in the stream
    CUT = "cut"  # the connection could not be made, or broke, or the stream just ended
    LATE = "late"  # it took too long for this client


@dataclass(frozen=True, slots=True)
class Answer:
    """When a request was due and sent, and when each event with tokens came, in seconds of ``time.perf_counter``.

    end: when the stream ended, or the error came. prompt_tokens and tokens: counts the server reported.
    error: what went wrong, None for a whole answer. text: as far as it came. Every latency counts from ``due``.
    """

    due: float
    sent: float
    events: tuple[float, ...]
    end: float
    prompt_tokens: int
    tokens: int
    error: str | None = None
    ending: Ending = Ending.WHOLE
    text: str = ""

    @property
    def ttft_ms(self) -> float:
        """Milliseconds until the first token."""
        return (self.events[0] - self.due) * 1e3

    @property
    def total_ms(self) -> float:
        """Milliseconds until the end of the answer."""
        return (self.end - self.due) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between events with tokens: what a reader waits, also where a server sends several together."""
        return [(later - earlier) * 1e3 for earlier, later in zip(self.events, self.events[1:], strict=False)]

    @property
    def token_ms(self) -> float:
        """Mean milliseconds a token after the first; 0 for an answer of one. Tokens without a text count as well."""
        return (self.end - self.events[0]) * 1e3 / (self.tokens - 1) if self.tokens > 1 else 0.0

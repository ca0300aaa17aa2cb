"""One client request from its arrival to its end: what metrics, the access line and its span tell of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.trace import INVALID_SPAN, Span

from engine.request import GenerationChunk, Timings


@dataclass(slots=True)
class RequestRecord:
    """Filled in on the way. Nothing that a client wrote is in it but the name of a model that there is.

    id: of the answer. model: empty until it is known that there is one of this name. tenant: whose key it was. adapter:
    content digest, empty for the base model. whole: not streamed. status: HTTP. error: its code. replica, reason: of
    the last routing decision. started_ns: since the epoch; the other times are monotonic seconds. first_token_at: None
    as long as none was generated, as for an embedding. finish_reasons and
    timings: of the choices that got to their ends. span: the request's own.
    """

    whole: bool = False
    id: str = ""
    request_id: str = ""
    tenant: str = ""
    model: str = ""
    adapter: str = ""
    status: int = 0
    error: str = ""
    replica: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choices: int = 1
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    first_token_at: float | None = None
    ended_at: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    timings: list[Timings] = field(default_factory=list)
    span: Span = INVALID_SPAN

    def saw(self, chunk: GenerationChunk) -> None:
        """A piece of the answer came from a replica."""
        if self.first_token_at is None and chunk.completion_tokens:
            made = time.monotonic()
            if self.whole and chunk.timings is not None:  # it was kept until the last token
                made -= chunk.timings.decode_s
            self.first_token_at = made
        if chunk.finish_reason is not None:
            self.finish_reasons.append(chunk.finish_reason)
            if chunk.timings is not None:
                self.timings.append(chunk.timings)

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first token; None when there was none."""
        return None if self.first_token_at is None else self.first_token_at - self.started

    @property
    def total_s(self) -> float:
        """Seconds until the end, or until now."""
        return (self.ended_at or time.monotonic()) - self.started

    @property
    def cut(self) -> str:
        """Why an answer that had begun did not get to its end; empty for one that did."""
        if self.status != 200 or len(self.finish_reasons) == self.choices:
            return ""
        return self.error or "client_left"

    def facts(self) -> dict[str, Any]:
        """All of it that is known, under the names that the access line has for it."""
        told: dict[str, Any] = {
            "generation_id": self.id,
            "client_request_id": self.request_id,
            "tenant": self.tenant,
            "model": self.model,
            "adapter_digest": self.adapter,
            "status": self.status,
            "error": self.error or self.cut,
            "finish_reason": ",".join(dict.fromkeys(self.finish_reasons)),
            "streamed": not self.whole,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "total_s": round(self.total_s, 6),
            "replica_id": self.replica,
            "routing_reason": self.reason,
        }
        if self.timings:
            for part in ("adapter_s", "queue_s", "prefill_s", "decode_s"):  # of the choice where it was longest
                told[part] = round(max(getattr(timing, part) for timing in self.timings), 6)
        return {name: value for name, value in told.items() if value not in ("", None)}

"""Requests and tokens of each adapter, for Prometheus, through Ray. A gateway counts them: it knows the names."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from deployments.adapters.label_cap import LabelCap


class AdapterMetrics:
    """Counters with an ``adapter`` label: the base model's or an adapter's name, or ``other`` beyond the cap."""

    def __init__(self, top: int) -> None:
        """top: see ``LabelCap``."""
        self._cap = LabelCap(top)
        tags: Any = ("adapter", "status"), ("adapter", "kind")  # Serve's annotation says tuples of one
        self._requests = metrics.Counter("lorafleet_adapter_requests_total", "Requests by adapter, outcome.", tags[0])
        self._tokens = metrics.Counter("lorafleet_adapter_tokens_total", "Tokens by adapter.", tags[1])

    def count(self, model: str, status: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """One request that has ended. model: what the client asked for, if there is such a model; else an empty name,
        so that nobody can fill the labels with names that they made up."""
        label = self._cap.label(model) if model else ""
        self._requests.inc(1, {"adapter": label, "status": str(status)})
        for kind, tokens in (("prompt", prompt_tokens), ("completion", completion_tokens)):
            if tokens:
                self._tokens.inc(tokens, {"adapter": label, "kind": kind})

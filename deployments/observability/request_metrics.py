"""Requests as clients had them, for Prometheus: a gateway counts them, it knows names and times."""

from __future__ import annotations

from collections import Counter

from adapter_store.load_stats import SECONDS_BOUNDS
from deployments.observability.label_cap import LabelCap
from deployments.observability.publisher import Reading
from deployments.observability.request_record import RequestRecord
from engine.histogram import Histogram

PERIOD_SECONDS = 1.0


class RequestMetrics:
    """Counts by adapter and by tenant; a label is a name, or ``other`` beyond the cap. One event loop's."""

    def __init__(self, adapters: int, tenants: int) -> None:
        """How many have labels of their own, see ``LabelCap``."""
        self._adapters = LabelCap(adapters)
        self._tenants = LabelCap(tenants)
        self._totals: Counter[tuple[str, ...]] = Counter()
        self._ttft = Histogram(SECONDS_BOUNDS)
        self._seconds = Histogram(SECONDS_BOUNDS)
        self.open = 0

    def count(self, record: RequestRecord) -> None:
        """One request that has ended. One for no model that there is has an empty label, so that nobody can fill the
        labels with names that they made up."""
        adapter = self._adapters.label(record.model) if record.model else ""
        tenant = self._tenants.label(record.tenant) if record.tenant else ""
        status = str(record.status)
        totals = self._totals
        totals["lorafleet_adapter_requests_total", adapter, status] += 1
        totals["lorafleet_tenant_requests_total", tenant, status] += 1
        for kind, tokens in (("prompt", record.prompt_tokens), ("completion", record.completion_tokens)):
            if tokens:
                totals["lorafleet_adapter_tokens_total", adapter, kind] += tokens
                totals["lorafleet_tenant_tokens_total", tenant, kind] += tokens
        if record.cut:
            totals["lorafleet_requests_cut_total", record.cut] += 1
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        if record.status == 200:
            self._seconds.observe(record.total_s)

    async def read(self) -> Reading:
        """The numbers of now."""
        return {
            ("lorafleet_requests_open",): self.open,
            ("lorafleet_ttft_seconds",): self._ttft.read(),
            ("lorafleet_request_seconds",): self._seconds.read(),
            **self._totals,
        }

"""What the step loop counts of its steps, and when each request got where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

from adapter_store.load_stats import SECONDS_BOUNDS
from engine.histogram import Histogram
from engine.request import Timings
from engine.scheduler import PlannedRow, StepPlan
from engine.sequence import Sequence

GAP_BOUNDS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 5.0),
)
ROW_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class StepMeter:
    """Totals since the start. The loop's thread counts, any may read. Times are ``time.monotonic()``.

    adapter_seconds: from a request's arrival until its adapter was at hand, of requests with an adapter. queue_seconds:
    from then, or from its arrival, until its first step. prefill_seconds: from then until its first token.
    inter_token_seconds: between two tokens of one request, preemption included. step_seconds: from one result of the
    device to the next while it has work. step_rows: rows of a step. last_step_seconds: of the loop's last turn.
    """

    def __init__(self) -> None:
        self.adapter_seconds = Histogram(SECONDS_BOUNDS)
        self.queue_seconds = Histogram(SECONDS_BOUNDS)
        self.prefill_seconds = Histogram(SECONDS_BOUNDS)
        self.inter_token_seconds = Histogram(GAP_BOUNDS)
        self.step_seconds = Histogram(GAP_BOUNDS)
        self.step_rows = Histogram(ROW_BOUNDS)
        self.prompt_tokens = self.generated_tokens = self.steps = 0
        self.last_step_seconds = 0.0
        self._flying = False  # whether there is a step to read after the one that lands
        self._landed_at = 0.0  # 0 after a pause

    def launched(self, plan: StepPlan, now: float) -> None:
        """A step was launched, or there was none to launch. now: when it was planned."""
        self._flying = bool(plan.rows)
        if self._flying:
            self.step_rows.observe(len(plan.rows))
        for row in plan.rows:
            sequence = row.sequence
            if row.start < sequence.prompt_tokens:
                self.prompt_tokens += min(row.end, sequence.prompt_tokens) - row.start
                if not sequence.first_step_at:
                    self._begun(sequence, now)

    def landed(self, rows: Rows[PlannedRow], now: float) -> None:
        """A step's draws were read: a token for each of ``rows``. Most have the same gap, so that one
        observation will do for them."""
        self.steps += 1
        if self._landed_at:
            self.step_seconds.observe(now - self._landed_at)
        self._landed_at = now if self._flying else 0.0
        gaps: Counter[float] = Counter()
        for row in rows:
            sequence = row.sequence
            if sequence.finished:
                continue
            if sequence.drawn_at:
                gaps[sequence.drawn_at] += 1
            else:
                sequence.first_token_at = now
                self.prefill_seconds.observe(now - sequence.first_step_at)
            sequence.drawn_at = now
        for before, times in gaps.items():
            self.inter_token_seconds.observe(now - before, times)

    def _begun(self, sequence: Sequence, now: float) -> None:
        sequence.first_step_at = now
        if sequence.request.adapter is not None:
            self.adapter_seconds.observe(sequence.queued_at - sequence.arrived_at)
        self.queue_seconds.observe(now - sequence.queued_at)


def timings(sequence: Sequence, now: float) -> Timings:
    """Where the time of a request went that ends ``now``, whatever it had come to."""
    queued_at = sequence.queued_at or now
    first_step_at = sequence.first_step_at or now
    first_token_at = sequence.first_token_at or now
    return Timings(
        adapter_s=queued_at - sequence.arrived_at,
        queue_s=first_step_at - queued_at,
        prefill_s=first_token_at - first_step_at,
        decode_s=now - first_token_at,
    )

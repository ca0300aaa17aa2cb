"""Service-level objectives, and one rate's answers measured by them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.percentile import percentile
from benchmarks.common.report import Row
from benchmarks.serving.answer import Answer


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user is promised: the first token within ``ttft_ms``, the others ``itl_ms`` apart on average."""

    ttft_ms: float
    itl_ms: float

    def met(self, answer: Answer) -> bool:
        """Whether this request got both. A failed one did not."""
        return answer.error is None and answer.ttft_ms <= self.ttft_ms and answer.token_ms <= self.itl_ms

    def summarize(self, answers: Sequence[Answer], start: float, duration: float) -> Row:
        """Counts, latencies of whole answers, and what share of all requests met both objectives.

        start: the moment arrivals count from; they came for ``duration`` seconds. goodput_rps: requests a second of
        arrivals that met both. tok_s: tokens of whole answers a second, until the last one ended.
        late_ms_p99: how long after it was due this client sent a request; the latencies contain it.
        """
        whole = [answer for answer in answers if answer.error is None]
        gaps = [gap for answer in whole for gap in answer.gaps_ms]
        met = sum(map(self.met, answers))
        end = max((answer.end for answer in whole), default=start)
        return {
            "requests": len(answers),
            "errors": len(answers) - len(whole),
            "ttft_ms_p50": percentile((answer.ttft_ms for answer in whole), 0.5),
            "ttft_ms_p99": percentile((answer.ttft_ms for answer in whole), 0.99),
            "itl_ms_p50": percentile(gaps, 0.5),
            "itl_ms_p99": percentile(gaps, 0.99),
            "token_ms_p50": percentile((answer.token_ms for answer in whole), 0.5),
            "total_ms_p50": percentile((answer.total_ms for answer in whole), 0.5),
            "total_ms_p99": percentile((answer.total_ms for answer in whole), 0.99),
            "slo_ttft_ms": self.ttft_ms,
            "slo_itl_ms": self.itl_ms,
            "attained": met / len(answers) if answers else None,
            "goodput_rps": met / duration,
            "tok_s": sum(answer.tokens for answer in whole) / (end - start) if whole else None,
            "prompt_tokens": statistics.fmean(answer.prompt_tokens for answer in whole) if whole else None,
            "output_tokens": statistics.fmean(answer.tokens for answer in whole) if whole else None,
            "late_ms_p99": percentile(((answer.sent - answer.due) * 1e3 for answer in answers), 0.99),
        }

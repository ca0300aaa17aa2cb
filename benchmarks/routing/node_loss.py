"""A node is killed in the middle of a run: what became of every request."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import Row
from benchmarks.routing.traffic import Outcome
from benchmarks.serving.answer import Ending


def account(outcomes: Sequence[Outcome]) -> Row:
    """Counts of requests.

    whole: answered in full. moved: of those, the ones whose gateway was on the lost node and had sent nothing, so that
    another gateway was asked. told: had begun, and ended with an error event. cut: had begun, and their gateway was on
    the lost node, so that only the connection's end could tell. lost: had not begun and got no whole answer. wrong: of
    whatever came, what was not the exact text, or the beginning of it. untold: had begun and just did not go on.
    """
    broken = [outcome for outcome in outcomes if not outcome.whole]
    return {
        "requests": len(outcomes),
        "whole": len(outcomes) - len(broken),
        "moved": sum(outcome.moved for outcome in outcomes if outcome.whole),
        "told": sum(outcome.begun and outcome.answer.ending is Ending.TOLD for outcome in broken),
        "cut": sum(outcome.begun and outcome.answer.ending is Ending.CUT for outcome in broken),
        "lost": sum(not outcome.begun for outcome in broken),
        "wrong": sum(not outcome.exact for outcome in outcomes),
        "untold": sum(outcome.begun and outcome.answer.ending is Ending.LATE for outcome in broken),
    }


def failures(row: Row) -> list[str]:
    """What must not be, of ``account``'s row."""
    return [f"{row[name]} {name}" for name in ("lost", "wrong", "untold") if row[name]]

"""What is said of long transfers, and where."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from adapter_store import progress
from adapter_store.progress import Progress

MIB = 2**20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("loading model", 100 * MIB) as told:
        for _ in range(50):
            clock[0] += 0.5
            told.advance(2 * MIB)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "loading model: 8 MiB of 100 (8 %), 4.0 MiB/s, 23 s left"
    assert len(lines) == 3


def test_what_is_done_at_once_is_not_spoken_of(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("fetching", 10) as told:
        clock[0] += 1.9
        told.advance(10)
    assert not caplog.records


def test_an_unknown_size(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("fetching", None) as told:
        clock[0] += 4
        told.advance(MIB)
    assert [record.getMessage() for record in caplog.records] == ["fetching: 1 MiB, 0.2 MiB/s"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    with caplog.at_level(logging.INFO), Progress("loading", 4 * MIB) as told:
        told.advance(MIB)
        told._bar.refresh()  # pyright: ignore
    assert "loading:" in screen.getvalue() and "1.00M/4.00M" in screen.getvalue()
    assert not caplog.records

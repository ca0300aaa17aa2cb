"""The long poll that news travels by: who is told what and when, and who has read how far."""

from __future__ import annotations

import asyncio

from deployments.news import board
from deployments.news.board import Board


async def test_a_reader_without_a_cursor_is_answered_at_once_also_when_there_is_nothing():
    made: Board[int] = Board()
    cursor, values = await asyncio.wait_for(made.watch(None, 60), 1.0)
    assert values == []
    await made.put("a", 1)
    await made.put("a", 2)
    await made.put("b", 3)
    cursor, values = await asyncio.wait_for(made.watch(cursor, 60), 1.0)
    assert sorted(values) == [2, 3], "the latest of each key"
    other: Board[int] = Board()
    await other.put("c", 4)
    assert (await asyncio.wait_for(other.watch(cursor, 60), 1.0))[1] == [4], "a cursor of another board"


async def test_spread_waits_until_every_reader_came_back_for_more():
    made: Board[int] = Board()
    cursors = {name: (await made.watch(None, 0, name))[0] for name in ("x", "y")}
    waiting = {name: asyncio.create_task(made.watch(cursor, 60, name)) for name, cursor in cursors.items()}
    await asyncio.sleep(0)
    sequence = await made.put("a", 1)
    spread = asyncio.create_task(made.spread(sequence, 60))
    got = {name: (await task)[0] for name, task in waiting.items()}
    more = [asyncio.create_task(made.watch(got["x"], 60, "x"))]
    await asyncio.sleep(0.05)
    assert not spread.done(), "y has it, but has not said that it took it in"
    more.append(asyncio.create_task(made.watch(got["y"], 60, "y")))
    assert await asyncio.wait_for(spread, 1.0)
    for task in more:
        task.cancel()


async def test_a_reader_that_is_gone_holds_nobody_up_for_long(monkeypatch):
    monkeypatch.setattr(board, "ABSENT_SECONDS", 0.05)
    made: Board[int] = Board()
    await made.watch(None, 0, "gone")
    assert not await made.spread(await made.put("a", 1), 0.01)
    await asyncio.sleep(0.06)
    assert await made.spread(await made.put("a", 2), 0.01)

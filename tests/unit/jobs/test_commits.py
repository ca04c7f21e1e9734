"""Lines whose end waits for Postgres."""

import asyncio
from collections.abc import Sequence

import pytest

from lmaas.jobs import commits
from lmaas.jobs.commits import MAX_WAITING_BYTES, Commits
from lmaas.states import LineState
from lmaas.store.batch_lines import EndedLine
from lmaas.store.database import Database


def line(position: int, answer: bytes) -> EndedLine:
    return EndedLine("ten", "batch", position, 1, LineState.DONE, "req", 200, answer, None, None)


async def test_no_line_begins_while_the_answers_that_wait_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    is_away = asyncio.Event()

    async def end_lines(_: Database, __: str, ___: Sequence[EndedLine]) -> None:
        await is_away.wait()

    monkeypatch.setattr(commits, "end_lines", end_lines)
    db, leaving, stored = Database("postgresql://nowhere", None), asyncio.Event(), list[object]()
    waiting = Commits(db, "run", stored.extend)
    task = asyncio.create_task(waiting.run())
    await waiting.room_for(leaving)
    large = bytes(MAX_WAITING_BYTES // 2 + 1)
    waiting.end(line(0, large))
    await waiting.room_for(leaving)
    waiting.end(line(1, large))
    blocked = asyncio.create_task(waiting.room_for(leaving))
    left = asyncio.Event()
    left.set()
    await waiting.room_for(left)
    assert not blocked.done()
    is_away.set()
    async with asyncio.timeout(10):
        await blocked
        await waiting.drained()
    assert stored == [line(0, large), line(1, large)]
    task.cancel()
    await db.close()

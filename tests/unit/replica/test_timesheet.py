"""The time sheet counts time that passes while it is written."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from lmaas.replica import timesheet
from lmaas.states import EnginePhase
from lmaas.store.models import BaseModel
from tests.support.clocks import Clock
from tests.support.conditions import until

MODEL = BaseModel("mod_1", "base", "no-model", "float32", {}, 16, 8, 8, 16, 2048, 2**28, "")


async def test_what_happens_during_a_write_is_written_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, kept = Clock(), Counter[Any]()

    async def price(*_: Any) -> int:
        return 0

    async def write(_: Any, __: str, ___: str, spans: dict[Any, int]) -> None:
        kept.update({span: ms - kept[span] for span, ms in spans.items()})
        # The phase continues for a while, and ends, before Postgres has responded.
        clock.now += 1
        sheet.observe(EnginePhase.LOADING if len(kept) % 2 else EnginePhase.BUSY)

    monkeypatch.setattr(timesheet, "WRITE_EVERY_S", 0.001)
    monkeypatch.setattr(timesheet, "record_engine_time", write)
    monkeypatch.setattr(timesheet, "engine_price", price)
    sheet = timesheet.TimeSheet(None, "rep_1", MODEL, clock)  # type: ignore[arg-type]  # no database is used
    async with sheet.kept():
        writing = asyncio.create_task(sheet.write_forever())
        await until(lambda: clock.passed_ms > 5000, every_s=0.01)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        sheet.observe(EnginePhase.IDLE)
        life_ms = clock.passed_ms
    assert kept.total() == life_ms

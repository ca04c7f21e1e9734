"""The time sheet of one engine. Its supervisor records it and stores it in Postgres."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from lmaas.errors import Unavailable
from lmaas.metering.engine_time import EngineMeter, Span
from lmaas.states import EnginePhase
from lmaas.store.database import Database
from lmaas.store.engine_time import engine_price, record_engine_time
from lmaas.store.models import BaseModel

log = logging.getLogger(__name__)

#: The interval between writes, which is the most time that is lost if a supervisor is killed.
WRITE_EVERY_S = 5.0
#: The time for which the supervisor tries to write the rest while Postgres is unavailable, after its engine has ended.
LAST_WORD_S = 600.0
RETRY_S = 1.0


class TimeSheet:
    """Counts an engine's time by phase during the block `kept()`, and writes it to Postgres as the only writer. The block lasts as long as
    the engine.

    Each write contains the totals so far, so it can be repeated, and nothing is lost while Postgres is unavailable.
    """

    def __init__(self, db: Database, replica_id: str, model: BaseModel, clock: Callable[[], float] = time.monotonic) -> None:
        self._db, self._replica, self._model, self._clock = db, replica_id, model, clock
        #: Created at the launch.
        self._meter: EngineMeter
        self._written: dict[Span, int] = {}

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Run the block that contains the engine's life, from before its launch until after its end. The rest is written however the block
        ends."""
        self._meter = EngineMeter(datetime.now(UTC), self._clock(), self._model.engine_price)
        try:
            yield
        finally:
            self._meter.observe(self._clock())
            await self._write_at_last()

    def observe(self, phase: EnginePhase) -> None:
        """Record that the engine is in this phase from now on."""
        self._meter.observe(self._clock(), phase=phase)

    async def write_forever(self) -> None:
        """Keep the rows in Postgres at most WRITE_EVERY_S old, while Postgres is available."""
        while True:
            await asyncio.sleep(WRITE_EVERY_S)
            with contextlib.suppress(Unavailable):
                # An operator may have changed the price. Earlier time keeps the old price.
                price = await engine_price(self._db, self._model.id)
                self._meter.observe(self._clock(), price=price)
                await self._write()

    async def _write(self) -> None:
        changed = {span: ms for span, ms in self._meter.spans.items() if self._written.get(span) != ms}
        await record_engine_time(self._db, self._replica, self._model.id, changed)
        self._written |= changed

    async def _write_at_last(self) -> None:
        extra = {"action": "meter", "replica_id": self._replica, "detail": f"{self._meter.total_ms} ms in all"}
        try:
            async with asyncio.timeout(LAST_WORD_S):
                while True:
                    try:
                        return await self._write()
                    except Unavailable:
                        log.warning("the engine's time cannot be written now", extra=extra)
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            log.error("the last of the engine's time was not written", extra=extra)  # noqa: TRY400 (expected: no trace)

"""A home folder with a zygote that has real vLLM in memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lmaas.engine.launch import shared_environment, zygote_owner
from lmaas.engine.zygote import owner, wire
from lmaas.engine.zygote.client import Fork, NoZygote, Order, fork
from lmaas.engine.zygote.owner import ZygoteOwner
from tests.support.conditions import until

IMPORTED_S = 120.0


@dataclass(frozen=True)
class Place:
    """A home folder with a zygote."""

    home: Path
    taker: ZygoteOwner

    async def fork(self, module: str, arguments: list[str], log: Path, *, kept: bool, timeout_s: float = IMPORTED_S) -> Fork:
        """Have a process forked. Raises NoZygote."""
        order = Order(module, arguments, {"PATH": "/usr/bin:/bin"}, log, kept)
        return await fork(self.home, order, wire.facts(shared_environment()), timeout_s)

    @property
    def pid(self) -> int:
        """Return the zygote's process id, or 0."""
        return owner.listener(self.home)

    async def imported(self) -> None:
        """Wait until the zygote forks."""

        async def answers() -> bool:
            await self.taker.ensure()
            try:
                (await self.fork("lmaas.testing.nothing", [], Path("/dev/null"), kept=False)).connection.close()
            except NoZygote:
                return False
            return True

        await until(answers, timeout_s=IMPORTED_S)

    def left(self) -> list[psutil.Process]:
        """Return the zygote and its forked processes that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LMAAS_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@asynccontextmanager
async def zygote_in(home: Path) -> AsyncIterator[Place]:
    """Provide a home folder whose zygote has imported everything. None of its processes is left afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMAAS_HOME", str(home))
        there = Place(home, zygote_owner(home, 60))
        try:
            await there.imported()
            yield there
        finally:
            await asyncio.to_thread(there.taker.stop)
            await until(lambda: not there.left())

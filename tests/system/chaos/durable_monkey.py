"""The chaos monkey beside durable work: it also kills and freezes job runners, and needs no long streams."""

import asyncio
from collections.abc import Awaitable, Callable

from lmaas.store.runners import RUNNER_LOST_S
from tests.support.conditions import until
from tests.system.chaos.clients import Worker
from tests.system.chaos.durable import Owner
from tests.system.chaos.monkey import Monkey
from tests.system.chaos.service import Service


class DurableMonkey(Monkey):
    """Causes every fault once in each round. A fault waits until lines have been finished since the last one."""

    def __init__(self, service: Service, workers: list[Worker], owners: list[Owner], seed: str) -> None:
        super().__init__(service, workers, seed)
        self._owners = owners
        self._frozen: list[asyncio.Task[None]] = []
        mine: dict[str, Callable[[], Awaitable[str]]] = {
            "gateway": self._gateway,
            "runner": self._runner,
            "runner again": self._runner,
            "runners": self._all_runners,
            "runner frozen": self._freeze,
        }
        left = ("controllers that write", "engine", "supervisor", "valkey without memory", "valkey stall", "postgres")
        self._faults = mine | {kind: self._faults[kind] for kind in left}

    async def run(self, seconds: float) -> None:
        """Run at least one round, and until every frozen runner has woken up."""
        await super().run(seconds)
        await asyncio.gather(*self._frozen)

    async def _gateway(self) -> str:
        name = self._random.choice(self._service.gateways)
        await self._restart(name)
        return name

    async def _runner(self) -> str:
        name = self._random.choice(self._service.runners)
        await self._goes_on()
        await self._restart(name)
        return name

    async def _all_runners(self) -> str:
        await self._goes_on()
        await asyncio.gather(*(self._restart(name) for name in self._service.runners))
        return "all"

    async def _freeze(self) -> str:
        """Suspend a job runner until the others have taken over its work, and continue with other faults."""
        name = self._random.choice(self._service.runners)
        await self._goes_on()
        self._frozen.append(asyncio.create_task(self._thaw(name), name="frozen"))
        return name

    async def _thaw(self, name: str) -> None:
        with self._service.frozen(name):
            await asyncio.sleep(RUNNER_LOST_S + self._random.uniform(1, 4))

    async def _restart(self, name: str) -> None:
        self._service.kill(name)
        await asyncio.sleep(self._random.uniform(0, 1))
        self._service.start(name)

    async def _goes_on(self) -> None:
        """Wait until a line has ended, so that lines run."""
        before = await self._ended()

        async def more() -> bool:
            return await self._ended() != before

        await until(more, every_s=0.1)

    async def _ended(self) -> list[int]:
        return [await owner.progress() for owner in self._owners]

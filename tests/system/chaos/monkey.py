"""The chaos monkey: causes one fault after the other, at random times, until its time is over."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
from sqlalchemy import text

from lmaas.store.scopes import SYSTEM
from tests.support.conditions import until
from tests.support.verdict import Fault
from tests.system.chaos.clients import Worker
from tests.system.chaos.service import CONTROLLERS, Service, now

#: The processes that hold requests: facts that only they and Valkey know are lost if both die.
HOLDERS = ("gateway", "runner")
#: The minimum time between the death of one of them and a fault of Valkey: a lease (6 s) and its settlement. If both die within it,
#: accepted requests that only they had are lost. That is a double fault, for which lmaas promises nothing.
APART_S = 9.0
#: A stream with this many tokens has run for longer than the maximum age of a checkpoint.
OLD_TOKENS = 230


class Monkey:
    """Causes every fault once in each round, in random order and at random times."""

    def __init__(self, service: Service, workers: list[Worker], seed: str) -> None:
        self._service, self._workers = service, workers
        self._random = random.Random(seed)
        self._last_holder = self._last_valkey = 0.0
        self._faults: dict[str, Callable[[], Awaitable[str]]] = {
            "gateway": self._gateway,
            "controller": self._controller,
            "controllers that write": self._writing_controllers,
            "engine": self._engine,
            "supervisor": self._supervisor,
            "valkey": self._valkey,
            "valkey without memory": self._valkey_without_memory,
            "flushall": self._flush,
            "valkey stall": self._stall,
            "postgres": self._postgres,
        }

    async def run(self, seconds: float) -> None:
        """Run at least one round."""
        end = now() + seconds
        rounds = 0
        while rounds == 0 or now() < end:
            left = list(self._faults)
            self._random.shuffle(left)
            while left and (rounds == 0 or now() < end):
                await asyncio.sleep(self._random.uniform(0.3, 2.0))
                kind = await self._next(left)
                left.remove(kind)
                began = now()
                target = await self._faults[kind]()
                if target:
                    self._service.faults.append(Fault(kind, target, began, now()))
                if kind.startswith(HOLDERS):
                    self._last_holder = now()
                if _of_valkey(kind):
                    self._last_valkey = now()
            rounds += 1

    async def _next(self, left: list[str]) -> str:
        """Return the first fault that may be caused now, or wait if there is none."""
        found: list[str] = []

        async def allowed() -> bool:
            found[:] = [kind for kind in left if await self._allowed(kind)]
            return bool(found)

        await until(allowed, every_s=0.2)
        return found[0]

    async def _allowed(self, kind: str) -> bool:
        if kind.startswith(HOLDERS):
            return now() - self._last_valkey > APART_S
        if _of_valkey(kind):
            return now() - self._last_holder > APART_S and not await self._waits_for_the_ledger()
        return True

    async def _waits_for_the_ledger(self) -> bool:
        """Return whether only Valkey has a request of a dead gateway or job runner."""
        for model in self._service.models:
            entries: Any = await self._service.scheduler.redis.xrange(f"lmaas:{{{model.id}}}:usage")
            if any('"lost"' in fields["event"] or '"wasted"' in fields["event"] for _, fields in entries):
                return True
        return False

    def _streams(self, gateway: str = "", tokens: int = 1) -> int:
        """Return the number of streams that have received this many tokens, of one gateway or of all."""
        running = [worker.current for worker in self._workers]
        return sum(one is not None and one.stream and one.tokens >= tokens and one.gateway.startswith(gateway) for one in running)

    async def _gateway(self) -> str:
        name = self._random.choice(self._service.gateways)
        # One of them is old enough to reveal a missing checkpoint.
        await until(lambda: self._streams(name) >= 2 and self._streams(name, OLD_TOKENS) >= 1, every_s=0.01)
        self._service.kill(name)
        await asyncio.sleep(self._random.uniform(0, 1))
        self._service.start(name)
        return name

    async def _controller(self) -> str:
        name = f"controller-{self._random.randrange(CONTROLLERS)}"
        self._service.kill(name)
        await asyncio.sleep(self._random.uniform(0, 2))
        self._service.start(name)
        return name

    async def _writing_controllers(self) -> str:
        """Kill and restart all controllers while one of them is writing events that the ledger does not have yet."""
        async with self._service.db.begin(SYSTEM) as connection:
            await connection.execute(text("LOCK TABLE usage_events IN SHARE ROW EXCLUSIVE MODE"))

            async def waits() -> bool:
                query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO usage_events%'"
                # A new transaction each time, because a transaction reads the activity of others only once.
                async with self._service.db.begin(SYSTEM) as other:
                    return bool((await other.execute(text(query))).scalar_one())

            await until(waits, every_s=0.02)
            for number in range(CONTROLLERS):
                self._service.kill(f"controller-{number}")
        for number in range(CONTROLLERS):
            self._service.start(f"controller-{number}")
        return "all"

    async def _engine(self) -> str:
        await until(lambda: self._streams() >= 3, every_s=0.01)
        return self._kill_engine(supervisor=False)

    async def _supervisor(self) -> str:
        # Replicas that are starting count too, because there may be no others.
        await until(self._service.supervisors)
        return self._kill_engine(supervisor=True)

    def _kill_engine(self, *, supervisor: bool) -> str:
        supervisors, engines = self._service.supervisors(), self._service.engines()
        victims = sorted(supervisors if supervisor else engines)
        if not victims:
            return ""
        replica = self._random.choice(victims)
        self._service.killed_replicas.add(replica)
        if replica in engines:
            # An engine dies with its supervisor.
            self._service.faults.append(Fault("engine", str(engines[replica].pid), now(), now()))
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            (supervisors if supervisor else engines)[replica].kill()
        return replica if supervisor else ""

    async def _valkey(self) -> str:
        return await self._restart_valkey(forgetful=False)

    async def _valkey_without_memory(self) -> str:
        return await self._restart_valkey(forgetful=True)

    async def _restart_valkey(self, *, forgetful: bool) -> str:
        self._service.kill_valkey()
        await asyncio.sleep(self._random.uniform(0, 2))
        self._service.start_valkey(forgetful=forgetful)
        return "forgetful" if forgetful else "restarted"

    async def _flush(self) -> str:
        await self._service.scheduler.redis.flushall()
        return "flushed"

    async def _stall(self) -> str:
        with self._service.stalled_valkey():
            await asyncio.sleep(self._random.uniform(1, 3))
        return "stalled"

    async def _postgres(self) -> str:
        await self._service.stop_postgres()
        await asyncio.sleep(self._random.uniform(2, 5))
        await self._service.start_postgres()
        return "stopped"


def _of_valkey(kind: str) -> bool:
    return kind.startswith("valkey") or kind == "flushall"

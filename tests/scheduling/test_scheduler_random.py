"""Random operations on the scheduler in a real Valkey: whatever comes, what it stores does not contradict itself."""

import random

import pytest

from lmaas.scheduling.client import Bounds, Scheduler
from tests.conftest import until
from tests.scheduling.build import Pool, quick, ticket

REPLICAS = ("x", "y", "z")
SLOTS = {"x": 2, "y": 3, "z": 4}
ADAPTER_SLOTS = {"x": 1, "y": 2, "z": 2}
ADAPTERS = ("", "", "A", "B", "C", "D")


class Actors:
    """Gateways and supervisors that do one random thing after the other."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.scheduler = pool.scheduler
        self.random = random.Random(seed)
        self.numbers = iter(range(1, 100_000))
        self.released: set[str] = set()
        self.recorded = 0
        self.replica_names = {name: name for name in REPLICAS}

    async def beat(self) -> None:
        """A supervisor beats; one whose last life has ended has another name."""
        place = self.random.choice(REPLICAS)
        state = self.random.choice(("ready", "ready", "ready", "starting"))
        await self.pool.beat(
            self.replica_names[place],
            state=state,
            slots=SLOTS[place],
            adapter_slots=ADAPTER_SLOTS[place],
            cleared=self.random.random() < 0.5,
        )

    async def submit(self) -> None:
        number = next(self.numbers)
        tenant, adapter = self.random.choice("abcd"), self.random.choice(ADAPTERS)
        one = ticket(number, tenant, adapter, self.random.choice((1, 1, 1, 1, 2, 5)))
        reply = await self.scheduler.submit(one, Bounds(5, 10_000))
        if reply["state"] == "refused":
            self.released.add(one.id)

    async def release(self) -> None:
        if known := sorted(await self.pool.states()):
            name = self.random.choice(known)
            event = f'{{"request_id": "{name}"}}'
            assert await self.scheduler.release(ticket(int(name[1:])), event, self.random.choice((None, 50)))
            self.released.add(name)
            self.recorded += 1

    async def retry(self) -> None:
        granted = {name: each for name, each in (await self.pool.tickets()).items() if each["state"] == "granted"}
        if granted:
            name = self.random.choice(sorted(granted))
            reason = self.random.choice(("engine", "adapter"))
            before = granted[name]["attempts"]
            reply = await self.pool.retry(int(name[1:]), granted[name]["replica"], reason)
            assert reply["attempts"] == before + 1
            assert (reply["state"] == "failed") == (before == 1)

    async def load(self) -> None:
        replicas = await self.pool.replicas()
        waiting = [(name, adapter) for name, replica in sorted(replicas.items()) for adapter in sorted(replica["loading"])]
        if waiting:
            name, adapter = self.random.choice(waiting)
            tickets = len(replicas[name]["loading"][adapter]["tickets"])
            if self.random.random() < 0.7:
                assert await self.scheduler.loaded("p", name, adapter) == tickets
            else:
                assert await self.scheduler.load_failed("p", name, adapter, "broken") == tickets

    async def evict(self) -> None:
        replicas = await self.pool.replicas()
        resident = [(name, adapter) for name, replica in sorted(replicas.items()) for adapter in sorted(replica["resident"])]
        if resident:
            name, adapter = self.random.choice(resident)
            assert await self.scheduler.evict("p", name, adapter) == (adapter not in replicas[name]["running"])

    async def renew(self) -> None:
        names = sorted(await self.pool.states())
        reply = await self.scheduler.renew("p", [(name, "1,0,1") for name in names])
        assert "unknown" not in {report["state"] for report in reply["tickets"]}

    async def drain(self) -> None:
        place = self.random.choice(REPLICAS)
        await self.scheduler.drain("p", self.replica_names[place])

    async def end(self) -> None:
        """A replica ends. Its gateways hear of it; an id is never used twice."""
        place = self.random.choice(REPLICAS)
        await self.scheduler.deregister("p", self.replica_names[place])
        self.replica_names[place] = f"{place}{next(self.numbers)}"

    async def step(self) -> None:
        """One random thing."""
        actions = [self.beat, self.submit, self.release, self.retry, self.load, self.evict, self.renew, self.drain, self.end]
        [action] = self.random.choices(actions, weights=[20, 40, 25, 6, 15, 5, 5, 1, 1])
        await action()


@pytest.mark.parametrize("seed", range(4))
async def test_random_operations(scheduler: Scheduler, seed: int) -> None:
    pool = Pool(scheduler)
    actors = Actors(pool, seed)
    for _ in range(400):
        await actors.step()
        await pool.check()
        assert not actors.released & set(await pool.tickets())
    assert actors.recorded > 50
    assert len(await pool.events()) == actors.recorded
    # Everything ends: with ready replicas and loads that succeed, nobody waits for ever.
    for _ in range(2000):
        if not await pool.states():
            break
        for place, name in actors.replica_names.items():
            reply = await pool.beat(name, slots=SLOTS[place], adapter_slots=ADAPTER_SLOTS[place], cleared=True)
            if reply["state"] == "draining" and reply["load"] == 0:
                await scheduler.deregister("p", name)
                actors.replica_names[place] = f"{place}{next(actors.numbers)}"
            for adapter in reply["loads"]:
                await scheduler.loaded("p", name, adapter)
        for name, state in (await pool.states()).items():
            if state not in ("queued", "loading"):
                await pool.release(int(name[1:]))
        await pool.check()
    assert await pool.states() == {}
    assert all(replica["load"] == 0 for replica in (await pool.replicas()).values())


async def test_random_operations_while_everything_expires(scheduler: Scheduler) -> None:
    pool = Pool(scheduler)
    actors = Actors(pool, 99)
    submitted = 0
    async with quick(scheduler, LEASE_MS=20, STALE_MS=30, GONE_MS=10_000):
        for _ in range(500):
            await actors.beat()
            await actors.submit()
            submitted += 1
            await pool.check()

        async def all_expired() -> bool:
            await scheduler.stats("p")
            return await pool.states() == {}

        await until(all_expired, 10, 0.01)
    events = await pool.events()
    names = [event["request_id"] for event in events]
    assert len(names) == len(set(names)) == submitted - len(actors.released)
    assert {event["status"] for event in events} == {"lost"}
    await pool.check()

"""A whole service whose replicas run on a cluster of three nodes, under load: a node dies, a controller dies. Fake engines."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count

import pytest

from lmaas.store.models import change_base_model
from lmaas.store.replicas import list_replicas
from tests.integration.gateway.stack import Stream
from tests.support.conditions import until
from tests.system.chaos.service import SLOTS, Service
from tests.system.faults.conftest import Caller, completed
from tests.system.ray.cluster import Fleet, restart_ended, service_on

REPLICAS = 2
#: At 15 ms a token, a request takes a second.
TOKENS = 60


@pytest.fixture(scope="module")
async def caller(fleet: Fleet) -> AsyncIterator[Caller]:
    """A tenant of a service on a cluster of three nodes, each with room for one replica."""
    with fleet.nodes_with(1, "fleet", REPLICAS + 1):
        async with service_on(fleet.address, engine_max_replicas=REPLICAS, ray_resources="fleet=1") as service:
            yield await called(service)


async def called(service: Service) -> Caller:
    """A tenant of a service that keeps its replicas, whatever its requests."""
    await change_base_model(service.db, service.model.name, {"min_replicas": REPLICAS})
    (client,) = await service.clients("acme", 1, adapters=1, max_queued=1000)
    return Caller(service, client)


class Load:
    """Runs `at_once` streams at a time during the block; all that were begun end at its end."""

    def __init__(self, caller: Caller, at_once: int) -> None:
        self._caller, self._at_once = caller, at_once
        self._go_on = True
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Stream] = []

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._one_after_another(number)) for number in range(self._at_once)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._go_on = False
        await asyncio.gather(*self._tasks)

    async def _one_after_another(self, number: int) -> None:
        models = self._caller.client.models
        for turn in count():
            if not self._go_on:
                return
            stream = Stream()
            self.streams.append(stream)
            gateway = self._caller.service.gateways[turn % len(self._caller.service.gateways)]
            await self._caller.stream(stream, gateway, tokens=TOKENS, model=models[(number + turn) % len(models)])


async def ready(service: Service) -> set[str]:
    """Return the replicas that are ready."""
    return {row.id for row in await list_replicas(service.db) if row.observed == "ready"}


async def both_ready(service: Service) -> set[str]:
    """Wait until the maximum number of replicas is ready, and return them."""

    async def both() -> bool:
        return len(await ready(service)) == REPLICAS

    await until(both, 120)
    return await ready(service)


async def test_a_node_dies_under_load_and_no_queued_request_is_lost(fleet: Fleet, caller: Caller) -> None:
    service = caller.service
    before = await both_ready(service)
    supervisors = service.supervisors()
    nodes = {replica: fleet.node_of(supervisors[replica]) for replica in before}
    assert len(set(map(id, nodes.values()))) == REPLICAS, "replicas are spread over the nodes"
    doomed, other = sorted(before)
    (address,) = {each.laddr.ip for each in service.engines()[doomed].net_connections("tcp") if each.status == "LISTEN"}
    assert address == nodes[doomed].node_ip_address, "gateways on other machines reach it, and it listens on no other address"
    async with Load(caller, 6 * SLOTS) as load:
        await until(lambda: sum(1 for stream in load.streams if stream.done) > 2 * SLOTS)

        async def all_busy() -> bool:
            stats = await service.scheduler.stats(service.model.id)
            return all(stats["replicas"][replica]["load"] == SLOTS for replica in before)

        await until(all_busy)
        assert sum(1 for stream in load.streams if not stream.raw) > SLOTS, "many requests wait"
        await asyncio.to_thread(fleet.kill, nodes[doomed])

        async def replaced() -> bool:
            restart_ended(service)
            now = await ready(service)
            return len(now) == REPLICAS and doomed not in now

        await until(replaced, 120)
        (replacement,) = await ready(service) - before
        home = fleet.node_of(service.supervisors()[replacement])
        assert home is not nodes[other], "it is on the free node"
    broken = [stream for stream in load.streams if not completed(stream, TOKENS)]
    assert broken, "the node was busy"
    assert all(stream.tokens > 0 and stream.error is not None for stream in broken), "they ran, and their clients received an error"
    ledger = await caller.ledger(*(stream.headers["x-request-id"] for stream in load.streams))
    assert {event.status for event in ledger.values()} == {"completed", "failed"}
    assert sum(1 for event in ledger.values() if event.status == "failed") == len(broken)
    await caller.rests()


async def test_replicas_outlive_the_controller_and_the_next_one_adopts_them(caller: Caller) -> None:
    service = caller.service
    before = await both_ready(service)
    processes = {replica: process.pid for replica, process in service.supervisors().items()}
    async with Load(caller, 3 * SLOTS) as load:
        for name in ("controller-0", "controller-1"):
            service.kill(name)
        answered = len(load.streams)
        await until(lambda: len(load.streams) > answered + 3 * SLOTS)
        assert await ready(service) == before
        for name in ("controller-0", "controller-1"):
            service.start(name)
        # The new controller works: it replaces the lost replica, and no other.
        victim, kept = sorted(before)
        service.supervisors()[victim].kill()

        async def replaced() -> bool:
            now = await ready(service)
            return len(now) == REPLICAS and victim not in now

        await until(replaced, 120)
        assert service.supervisors()[kept].pid == processes[kept]
        assert len(service.supervisors()) == REPLICAS
    assert all(completed(stream, TOKENS) or stream.error is not None for stream in load.streams)
    await caller.rests()

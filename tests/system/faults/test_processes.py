"""Processes of lmaas are stopped, or killed at any point while a pool goes from no engine to one and back."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import psutil
import pytest

from lmaas.states import Desired, Observed
from lmaas.store.replicas import Replica, list_replicas
from tests.integration.gateway.stack import Stream
from tests.support.conditions import until
from tests.support.processes import command_of
from tests.system.chaos.service import CONTROLLERS, Service, running
from tests.system.faults.conftest import Caller, completed

DRAIN_S = 3.0
IDLE_S = 1.0


@pytest.fixture(scope="module")
async def caller() -> AsyncIterator[Caller]:
    """A tenant of a service that is soon idle, and whose engines start slowly."""
    async with running(fake="--fake-start-ms 400", drain_timeout_s=DRAIN_S, idle_timeout_s=IDLE_S, engine_max_replicas=1) as service:
        (client,) = await service.clients("acme", 1, adapters=1, max_queued=256)
        caller = Caller(service, client)
        for gateway in service.gateways:
            await until(lambda gateway=gateway: caller.works(gateway))
        yield caller
        await until(caller.works)


async def test_a_gateway_that_is_told_to_stop_cuts_nobody_without_a_word(caller: Caller) -> None:
    short, long, elsewhere = Stream(), Stream(), Stream()
    tasks = [caller.stream(short, tokens=60), caller.stream(long, tokens=2000), caller.stream(elsewhere, "gateway-1", tokens=300)]
    await until(lambda: short.tokens and long.tokens and elsewhere.tokens)
    process = caller.service.terminate("gateway-0")

    async def refuses() -> bool:
        try:
            await caller.ask()
        except httpx.TransportError:
            return True
        return False

    await until(refuses)
    assert not long.done
    assert await caller.works("gateway-1"), "the other one continues"
    code = await asyncio.to_thread(process.wait, 60)
    caller.service.start("gateway-0")
    await asyncio.gather(*tasks)
    assert code in (0, -15), code
    assert completed(short, 60)
    assert completed(elsewhere, 300)
    assert not long.done
    assert long.error is not None
    assert long.error["code"] == "gateway_stopped"
    charged = await caller.ledger(*(got.headers["x-request-id"] for got in (short, long)))
    cut = charged[long.headers["x-request-id"]]
    assert (cut.status, cut.code, cut.completion_tokens) == ("failed", "gateway_stopped", long.tokens)
    assert charged[short.headers["x-request-id"]].status == "completed"
    await caller.rests()
    await until(caller.works)


# At any point of 0→1→0


async def _rows(service: Service) -> list[Replica]:
    return await list_replicas(service.db, base_model_id=service.model.id)


async def _asked(_: Service) -> bool:
    return True


async def _row(service: Service) -> bool:
    return bool(await _rows(service))


async def _supervised(service: Service) -> bool:
    return bool(service.supervisors())


async def _launched(service: Service) -> bool:
    return bool(service.engines())


async def _ready(service: Service) -> bool:
    return any(row.observed == Observed.READY for row in await _rows(service))


async def _stopping(service: Service) -> bool:
    return any(row.desired == Desired.STOPPED for row in await _rows(service))


def _engines(service: Service) -> list[int]:
    """Return every engine and supervisor, including those without a parent that watches them."""
    return [one.pid for one in service.processes() if {"supervise", "lmaas.testing.fake_engine"} & set(command_of(one))]


async def _at_zero(service: Service) -> bool:
    return not await _rows(service) and not _engines(service)


def _kill_controllers(service: Service) -> None:
    for number in range(CONTROLLERS):
        service.kill(f"controller-{number}")


def _kill_supervisors(service: Service) -> None:
    for supervisor in service.supervisors().values():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
            supervisor.kill()


@pytest.mark.parametrize(
    ("victim", "point"),
    [
        *(("controller", point) for point in (_asked, _row, _supervised, _launched, _ready, _stopping)),
        *(("supervisor", point) for point in (_supervised, _launched, _ready, _stopping)),
    ],
    ids=lambda part: part if isinstance(part, str) else part.__name__.strip("_"),
)
async def test_killed_on_the_way_from_zero_to_one_and_back(
    caller: Caller, victim: str, point: Callable[[Service], Awaitable[bool]]
) -> None:
    service = caller.service
    await until(lambda: _at_zero(service))
    request = asyncio.create_task(caller.ask(tokens=20))
    if point is _stopping:
        await request
    await until(lambda: point(service), every_s=0.005)
    if victim == "controller":
        _kill_controllers(service)
        for number in range(CONTROLLERS):
            service.start(f"controller-{number}")
    else:
        _kill_supervisors(service)
    response = await request
    assert response.status_code == 200, response.text
    assert len(_engines(service)) <= 2, "one engine and its supervisor at most"
    # No pool is stuck: the next case, and the end of the fixture, begin from zero again.
    await until(lambda: _at_zero(service))


async def _lead(service: Service, name: str) -> None:
    """Make this controller the active one, and the other one stand by."""
    _kill_controllers(service)
    log = service.settings.home / f"{name}.log"
    before = log.read_text().count("controller active")
    service.start(name)
    await until(lambda: log.read_text().count("controller active") > before)
    for number in range(CONTROLLERS):
        if f"controller-{number}" != name:
            service.start(f"controller-{number}")


async def test_a_controller_that_stands_still_is_replaced_and_does_nothing_when_it_goes_on(caller: Caller) -> None:
    service = caller.service
    await until(lambda: _at_zero(service))
    await _lead(service, "controller-0")
    log = service.settings.home / "controller-0.log"
    stood_by = log.read_text().count("controller standing by")
    process = service.process("controller-0")
    process.send_signal(signal.SIGSTOP)
    try:
        before = {row.id for row in await list_replicas(service.db, ended=True)}
        # The other controller gets no message that the first one hangs: it finds it silent, and starts the requested engine.
        response = await caller.ask(tokens=20)
        assert response.status_code == 200, response.text
        request = asyncio.create_task(caller.ask(tokens=300))
        await until(lambda: _ready(service))
    finally:
        process.send_signal(signal.SIGCONT)
    await until(lambda: log.read_text().count("controller standing by") > stood_by)
    assert (await request).status_code == 200
    assert len(_engines(service)) <= 2, "one engine and its supervisor at most"
    await until(lambda: _at_zero(service))
    started = [row for row in await list_replicas(service.db, ended=True) if row.id not in before]
    assert {row.observed for row in started} == {Observed.STOPPED}, "no replica was lost, killed or started twice"

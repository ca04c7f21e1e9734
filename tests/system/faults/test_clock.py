"""The machine's clock jumps by an hour, for Valkey, Postgres and all processes of lmaas: leases use durations, not the time of day."""

import asyncio
import shutil
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.gateway.stack import Stream
from tests.support.conditions import until
from tests.system.chaos.service import running
from tests.system.faults.conftest import Caller, completed

HOUR_S = 3600
SOURCE = Path(__file__).with_name("clock.c")


@pytest.fixture(scope="module")
async def clocked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Caller, Callable[[int], None]]]:
    """A service, and a function that sets its clock to real time plus this many seconds."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a clock that can be set needs a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    library, shift = folder / "clock.so", folder / "shift"
    await asyncio.to_thread(subprocess.run, [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)

    def jump(seconds: int) -> None:
        with shift.open("r+b") as file:
            file.write(struct.pack("q", seconds))

    shift.write_bytes(struct.pack("q", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("SHIFTED_CLOCK", str(shift))
        async with running() as service:
            (client,) = await service.clients("acme", 1, adapters=1, max_queued=256)
            caller = Caller(service, client)
            for gateway in service.gateways:
                await until(lambda gateway=gateway: caller.works(gateway))
            yield caller, jump


@pytest.mark.parametrize("hours", [(1,), (-1,), (1, 0), (-1, 0)], ids=str)
async def test_leases_outlive_a_clock_that_jumps(clocked: tuple[Caller, Callable[[int], None]], hours: tuple[int, ...]) -> None:
    caller, jump = clocked
    jump(0)
    await until(caller.works)
    got = [Stream() for _ in range(4)]
    # More than the slots: some wait.
    tasks = [caller.stream(one, tokens=200 * len(hours), model=caller.client.models[number % 2]) for number, one in enumerate(got)]
    plain = [asyncio.create_task(caller.ask("gateway-1", tokens=100)) for _ in range(12)]
    for hour in hours:
        before = [one.tokens for one in got]
        await until(
            lambda before=before: all(one.tokens > count for one, count in zip(got, before, strict=True)) or all(t.done() for t in tasks)
        )
        jump(hour * HOUR_S)
        server_s, _ = await caller.service.scheduler.redis.time()
        assert abs(server_s - time.time() - hour * HOUR_S) < 60, "the server's clock did not jump"
        assert await caller.works(), "new requests are served"
    await asyncio.gather(*tasks)
    assert all(completed(one, 200 * len(hours)) for one in got), [(one.error, one.tokens) for one in got]
    assert {response.status_code for response in await asyncio.gather(*plain)} == {200}
    charged = await caller.ledger(
        *(one.headers["x-request-id"] for one in got), *(one.headers["x-request-id"] for one in await asyncio.gather(*plain))
    )
    assert {event.status for event in charged.values()} == {"completed"}
    await caller.rests()


#: After a jump forward and back, `spare` of scheduler.lua lies in the future, and nothing is reaped until then.


@pytest.mark.parametrize("hours", [(1,), (-1,), (1, 0)], ids=str)
async def test_after_a_jump_a_dead_gateways_slots_still_come_back_in_seconds(
    clocked: tuple[Caller, Callable[[int], None]], hours: tuple[int, ...]
) -> None:
    caller, jump = clocked
    jump(0)
    await until(caller.works)
    for hour in hours:
        jump(hour * HOUR_S)
        assert await caller.works()
    got = Stream()
    task = caller.stream(got, tokens=2000)
    await until(lambda: got.tokens > 0)
    caller.service.kill("gateway-0")
    await asyncio.gather(task, return_exceptions=True)
    caller.service.start("gateway-0")

    async def lost() -> bool:
        stats = await caller.service.scheduler.stats(caller.service.model.id)
        return bool(stats["load"] == 0)

    await until(lost)
    (event,) = (await caller.ledger(got.headers["x-request-id"])).values()
    assert event.status == "lost"
    await until(caller.works)

"""The zygote's loop, its owner and its clients, with a zygote that has no modules in memory."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lmaas.engine.launch import VLLM, EngineSpec, launched
from lmaas.engine.zygote import client, owner, policy, wire
from lmaas.engine.zygote.client import Fork, ForkedProcess, NoZygote, Order, fork, fork_when_there, go
from lmaas.engine.zygote.owner import ZygoteOwner, stop
from lmaas.engine.zygote.progress import Sight, plain_imports, running
from tests.integration.engine.zygote.light import SLOW
from tests.support.clocks import Clock
from tests.support.conditions import until

PROGRAM = "tests.integration.engine.zygote.program"
IDLE_S = 60.0


def light(home: Path, idle_s: float = IDLE_S) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.integration.engine.zygote.light", str(home), str(idle_s), client.ROOM_FOR_NAMES]
    return subprocess.Popen(command, start_new_session=True)


def answers(home: Path) -> bool:
    with wire.channel() as connection:
        connection.settimeout(5)
        try:
            with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
                connection.connect(path)
            return wire.receive(connection) is not None
        except OSError:
            return False


def order(home: Path, *arguments: str) -> Order:
    """An order of a program that is kept."""
    return Order(PROGRAM, list(arguments), os.environ | {"SECRET": ""}, home / "program.log", kept=True)


@dataclass(frozen=True)
class Light:
    """A zygote that accepts orders."""

    home: Path
    process: "subprocess.Popen[bytes]"

    async def fork(self, *arguments: str, kept: bool, secret: str = "", timeout_s: float = 30.0) -> Fork:
        """Have it fork a program. Raises NoZygote."""
        order = Order(PROGRAM, list(arguments), os.environ | {"SECRET": secret}, self.home / "program.log", kept)
        return await fork(self.home, order, {}, timeout_s)

    def said(self) -> str:
        """Return the output of the jobs."""
        path = self.home / "program.log"
        return path.read_text() if path.exists() else ""

    def children(self) -> list[psutil.Process]:
        """Return its child processes, including keepers."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
async def zygote(tmp_path: Path) -> AsyncIterator[Light]:
    process = light(tmp_path)
    try:
        await until(lambda: answers(tmp_path), timeout_s=60)
        yield Light(tmp_path, process)
    finally:
        process.kill()
        process.wait()


async def test_what_an_order_holds_never_reaches_the_zygote(zygote: Light) -> None:
    secret, plain = os.urandom(16).hex(), os.urandom(16).hex()
    engine = await zygote.fork("stay", plain, kept=True, secret=secret)
    supervisor = await zygote.fork("stay", plain, kept=False, secret=secret)
    go(supervisor)
    await until(lambda: zygote.said().count(secret) == 2, timeout_s=60)
    memory = memory_of(zygote.process.pid)
    assert plain.encode() in memory  # it would be found
    assert secret.encode() not in memory
    engine.connection.close()
    os.kill(supervisor.pid, signal.SIGTERM)
    await until(lambda: not zygote.children())


def memory_of(pid: int) -> bytes:
    """Return the writable memory of a child process."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            if part := re.match(r"(\w+)-(\w+) rw", line):
                begin, end = (int(text, 16) for text in part.groups())
                mem.seek(begin)
                found.append(mem.read(end - begin))
    return b"".join(found)


async def test_who_gives_up_after_the_fork_leaves_nothing(zygote: Light) -> None:
    for kept in (True, False):
        with wire.channel() as connection:
            connection.settimeout(30)
            with wire.short_path(wire.folder(zygote.home) / wire.SOCKET) as path:
                connection.connect(path)
            wire.receive(connection)
            wire.send(connection, {"do": "fork", "module": PROGRAM, "arguments": [], "kept": kept})
            assert wire.receive(connection) == {"forked": True}
            assert zygote.children()
        await until(lambda: not zygote.children())
    assert zygote.said() == ""


async def test_a_full_disk_does_not_end_a_zygote_that_learns(zygote: Light) -> None:
    process = ForkedProcess(await zygote.fork("one", kept=True))
    assert await process.wait() == 0
    await until((wire.folder(zygote.home) / "learnt").exists, timeout_s=60)
    process = ForkedProcess(await zygote.fork("two", kept=True))
    assert await process.wait() == 0
    assert zygote.process.poll() is None


async def test_those_that_went_away_while_a_zygote_stood_still_are_no_trouble(zygote: Light) -> None:
    os.kill(zygote.process.pid, signal.SIGSTOP)
    with pytest.raises(NoZygote):
        await zygote.fork(kept=False, timeout_s=0.2)
    os.kill(zygote.process.pid, signal.SIGCONT)
    process = ForkedProcess(await zygote.fork("afterwards", kept=True))
    assert await process.wait() == 0
    assert "afterwards" in zygote.said()


async def test_an_engine_starts_plainly_if_the_zygote_stands_still_and_nobody_replaces_it(
    zygote: Light, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "STILL_S", 1.0)
    os.kill(zygote.process.pid, signal.SIGSTOP)
    spec = EngineSpec(VLLM, "no-model", "base", "float32", 512, 4, 2, 16, 4, 1 << 20)
    async with launched(spec, 1, tmp_path / "engine.log", zygote.home) as engine:
        assert engine.by == "plain"
        assert plain_imports(zygote.home) == [engine.pid]  # so that no zygote imports beside it
    assert plain_imports(zygote.home) == []


async def test_a_start_does_not_wait_where_there_is_no_zygote_to_come(tmp_path: Path) -> None:
    with pytest.raises(NoZygote, match="no process of this service starts one"):
        await fork_when_there(tmp_path, order(tmp_path, "never"), {})


@asynccontextmanager
async def looked_after(home: Path, start: Callable[[], "subprocess.Popen[bytes]"]) -> AsyncIterator[ZygoteOwner]:
    """An owner that looks after the zygote of a home folder during the block."""
    taker = ZygoteOwner(home, start, dict)

    async def keep() -> None:
        while True:
            await taker.ensure()
            await asyncio.sleep(0.05)

    keeping = asyncio.create_task(keep())
    try:
        yield taker
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        await asyncio.to_thread(taker.stop)


async def test_a_start_waits_for_a_zygote_that_imports_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy, "STILL_S", 1.5)
    monkeypatch.setattr(owner, "EVERY_S", 0.1)
    monkeypatch.setenv(SLOW, "1")
    looks: list[Sight] = []
    async with looked_after(tmp_path, lambda: light(tmp_path)):
        await until(lambda: running(tmp_path) != 0)
        zygote = running(tmp_path)
        starting = asyncio.create_task(fork_when_there(tmp_path, order(tmp_path, "patient"), {}, looks.append))
        # Several times the time that a zygote may stand still.
        await until(lambda: sum(client.POLL_S for _ in looks) > 3 * policy.STILL_S)
        assert not starting.done()
        assert "killed" not in caplog.text
        assert all(look.pid == zygote and not look.serves for look in looks)
        assert looks[-1].used_s > looks[0].used_s
        (wire.folder(tmp_path) / "go").touch()
        process = ForkedProcess(await starting)
        assert await process.wait() == 0
        assert running(tmp_path) == zygote
    assert "patient" in (tmp_path / "program.log").read_text()


async def test_a_start_waits_for_the_zygote_that_replaces_a_stopped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy, "STILL_S", 1.5)
    monkeypatch.setattr(owner, "EVERY_S", 0.1)
    monkeypatch.setenv(SLOW, "1")
    async with looked_after(tmp_path, lambda: light(tmp_path)):
        await until(lambda: running(tmp_path) != 0)
        stopped = running(tmp_path)
        os.kill(stopped, signal.SIGSTOP)
        starting = asyncio.create_task(fork_when_there(tmp_path, order(tmp_path, "second"), {}))
        await until(lambda: running(tmp_path) not in (0, stopped))
        assert "it has made no progress" in str([record.__dict__.get("detail") for record in caplog.records])
        (wire.folder(tmp_path) / "go").touch()
        process = ForkedProcess(await starting)
        assert await process.wait() == 0


async def test_a_start_waits_for_the_zygote_with_its_own_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "EVERY_S", 0.1)
    facts = {"lmaas": "new"}
    monkeypatch.setenv(wire.FACTS, '{"lmaas": "old"}')
    old = light(tmp_path)
    await until(lambda: answers(tmp_path))
    monkeypatch.setenv(wire.FACTS, '{"lmaas": "new"}')
    with pytest.raises(NoZygote, match="another lmaas"):
        await fork_when_there(tmp_path, order(tmp_path, "alone"), facts)
    taker = ZygoteOwner(tmp_path, lambda: light(tmp_path), lambda: facts)
    await taker.ensure()  # it has ended the old one
    starting = asyncio.create_task(fork_when_there(tmp_path, order(tmp_path, "new"), facts))
    try:
        await asyncio.to_thread(old.wait, 30)

        async def forked() -> bool:
            await taker.ensure()
            return starting.done()

        await until(forked)
        assert await ForkedProcess(starting.result()).wait() == 0
    finally:
        await asyncio.to_thread(taker.stop)


async def fill(home: Path) -> None:
    """Fill the queue of connections of a zygote that stands still."""
    for _ in range(1000):
        with wire.channel() as connection, wire.short_path(wire.folder(home) / wire.SOCKET) as path:
            connection.setblocking(False)
            try:
                connection.connect(path)
            except BlockingIOError:
                return
    raise AssertionError("the line is endless")


@pytest.mark.parametrize("crowded", [False, True])
async def test_a_zygote_that_stands_still_is_killed_after_a_while_and_not_at_first_sight(
    zygote: Light, crowded: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never() -> "subprocess.Popen[bytes]":
        raise AssertionError("there is one")

    monkeypatch.setattr(owner, "HELLO_S", 0.1)
    os.kill(zygote.process.pid, signal.SIGSTOP)
    if crowded:
        await fill(zygote.home)
    clock = Clock()
    taker = ZygoteOwner(zygote.home, never, dict, clock)
    looks = 0
    while "killed" not in caplog.text:
        await taker.ensure()
        clock.now += owner.EVERY_S
        looks += 1
    assert policy.STILL_S / owner.EVERY_S <= looks <= policy.STILL_S / owner.EVERY_S + 3
    assert await asyncio.to_thread(zygote.process.wait, 30) == -signal.SIGKILL


async def test_an_owner_that_stood_still_itself_does_not_blame_the_zygote(zygote: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "HELLO_S", 0.1)
    clock = Clock()
    taker = ZygoteOwner(zygote.home, lambda: light(zygote.home), dict, clock)
    os.kill(zygote.process.pid, signal.SIGSTOP)
    for _ in range(2):
        await taker.ensure()
        clock.now += 10 * policy.STILL_S
    assert zygote.process.poll() is None


async def test_one_that_answered_in_between_did_not_stand_still(zygote: Light, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    taker = ZygoteOwner(zygote.home, lambda: light(zygote.home), dict, clock)
    for _ in range(3):
        os.kill(zygote.process.pid, signal.SIGSTOP)
        monkeypatch.setattr(owner, "HELLO_S", 0.1)
        for _ in range(int(policy.STILL_S / owner.EVERY_S) - 1):
            await taker.ensure()
            clock.now += owner.EVERY_S
        os.kill(zygote.process.pid, signal.SIGCONT)
        monkeypatch.setattr(owner, "HELLO_S", 10.0)
        await taker.ensure()
        clock.now += owner.EVERY_S
    assert zygote.process.poll() is None


async def test_its_owner_looks_at_our_files_once_a_minute(zygote: Light) -> None:
    clock, looks = Clock(), []

    def found() -> dict[str, str]:
        looks.append(clock.now)
        return {"lmaas": "another"} if len(looks) > 2 else {}

    taker = ZygoteOwner(zygote.home, lambda: light(zygote.home), found, clock)
    for _ in range(40):
        await taker.ensure()
        clock.now += owner.EVERY_S
    assert looks == [1000.0, 1000.0 + owner.FACTS_S + owner.EVERY_S]
    assert zygote.process.poll() is None
    clock.now += owner.FACTS_S
    await taker.ensure()  # the code on disk is now a different one
    assert await asyncio.to_thread(zygote.process.wait, 30) == 0


async def test_one_that_stands_still_before_a_full_line_is_stopped(zygote: Light) -> None:
    # As after a second start that found a running zygote.
    (wire.folder(zygote.home) / wire.PROCESS).write_text("0")
    os.kill(zygote.process.pid, signal.SIGSTOP)
    await fill(zygote.home)
    await asyncio.to_thread(stop, zygote.home)
    assert zygote.process.wait(30) == -signal.SIGKILL


async def test_nobody_waits_for_a_look_on_the_side(zygote: Light, caplog: pytest.LogCaptureFixture) -> None:
    os.kill(zygote.process.pid, signal.SIGSTOP)
    taker = ZygoteOwner(zygote.home, lambda: light(zygote.home), dict)
    looking = taker.tend()
    assert taker.tend() is looking  # one at a time
    await looking

    def broken() -> dict[str, str]:
        raise ValueError("no facts")

    os.kill(zygote.process.pid, signal.SIGCONT)
    await until(lambda: answers(zygote.home))
    looking = ZygoteOwner(zygote.home, lambda: light(zygote.home), broken).tend()
    with pytest.raises(ValueError, match="no facts"):
        await looking
    await until(lambda: "could not be checked" in caplog.text)


async def test_a_zygote_ends_when_its_owner_was_killed(tmp_path: Path) -> None:
    idle_s = 3.0
    script = (
        "import asyncio, sys, time; from pathlib import Path; from lmaas.engine.zygote import owner\n"
        "from tests.integration.engine.zygote.test_light import light\n"
        "owner.EVERY_S = 0.2\n"
        "async def main():\n"
        f"    home = Path({str(tmp_path)!r})\n"
        f"    taker = owner.ZygoteOwner(home, lambda: light(home, {idle_s}), dict)\n"
        "    while True:\n"
        "        await taker.ensure(); print(owner.listener(home), flush=True); await asyncio.sleep(0.1)\n"
        "asyncio.run(main())\n"
    )
    wire.folder(tmp_path).mkdir()
    controller = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    try:
        assert controller.stdout is not None
        while not (pid := int(await controller.stdout.readline())):
            pass
        until_s = time.monotonic() + 2 * idle_s
        while time.monotonic() < until_s:  # it is still needed, so it stays
            assert int(await controller.stdout.readline()) == pid
    finally:
        controller.kill()
        await controller.wait()
    zygote = psutil.Process(pid)
    await until(lambda: not zygote.is_running() or zygote.status() == psutil.STATUS_ZOMBIE, timeout_s=60)

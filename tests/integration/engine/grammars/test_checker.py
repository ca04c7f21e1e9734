"""The checker's processes: whatever a grammar does to the process that compiles it, its client gets a verdict and others are served."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lmaas.engine.grammars import client
from lmaas.engine.grammars.client import Checkers, NoVerdict
from lmaas.engine.grammars.verdict import INVALID, TOO_COMPLEX, UNKNOWN, Question, Verdict, decode_verdict, encode
from lmaas.engine.launch import VLLM, EngineSpec
from tests.integration.engine.grammars.stub import LINGERS, SLOW
from tests.support.conditions import until
from tests.support.processes import command_of

STUB = "tests.integration.engine.grammars.stub"


@dataclass
class Stubbed:
    """A checker's process, and its socket."""

    process: asyncio.subprocess.Process
    path: Path
    log: Path

    async def send(self, data: bytes) -> bytes:
        """Return the checker's reply to these bytes."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(data)
        writer.write_eof()
        try:
            return await reader.read()
        finally:
            writer.close()

    async def ask(self, do: str) -> Verdict:
        """Return the verdict on a grammar with this effect."""
        return decode_verdict(await self.send(encode(Question("/v1/chat/completions", {"do": do}))))

    @property
    def children(self) -> list[psutil.Process]:
        """Return the processes of running checks."""
        return psutil.Process(self.process.pid).children()


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Stubbed]:
    """A checker that listens."""
    async for found in started(tmp_path, 60):
        yield found


async def started(folder: Path, idle_s: float) -> AsyncIterator[Stubbed]:
    """A checker that ends after so many idle seconds, or with the test."""
    path, log = folder / "socket", folder / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", STUB, str(path), str(idle_s), stdout=output, stderr=output)
    try:
        await until(path.exists, every_s=0.01)
        yield Stubbed(process, path, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize(
    ("does", "code", "message"),
    [
        ("pass", "", ""),
        ("refuse", INVALID, "It is bad."),
        ("explode", TOO_COMPLEX, "takes more than"),
        ("abort", TOO_COMPLEX, "too much memory"),
        ("end", INVALID, "cannot be compiled"),
        ("raise", INVALID, "cannot be compiled"),
        ("sleep", UNKNOWN, "took too long"),
    ],
)
async def test_whatever_a_grammar_does_it_has_a_verdict(stub: Stubbed, does: str, code: str, message: str) -> None:
    verdict = await stub.ask(does)
    assert verdict.code == code
    assert message in verdict.message
    assert not await until_no_children(stub)
    assert (await stub.ask("pass")).code == ""


async def test_a_grammar_that_needs_too_much_memory_has_a_verdict(stub: Stubbed) -> None:
    # The machine decides which of the two limits is reached first, memory or time.
    assert (await stub.ask("grow")).code in (INVALID, TOO_COMPLEX)
    assert (await stub.ask("pass")).code == ""


async def until_no_children(stub: Stubbed) -> list[psutil.Process]:
    """Wait until no check runs."""
    await until(lambda: not stub.children)
    return stub.children


async def test_one_that_explodes_does_not_stop_another(stub: Stubbed) -> None:
    exploding = asyncio.create_task(stub.ask("sleep"))
    await until(lambda: stub.children)
    for _ in range(5):
        assert (await stub.ask("pass")).code == ""
    assert not exploding.done()
    assert (await exploding).code == UNKNOWN


async def test_many_at_once_are_all_answered(stub: Stubbed) -> None:
    assert {verdict.code for verdict in await asyncio.gather(*(stub.ask("pass") for _ in range(40)))} == {""}


async def test_what_a_grammar_prints_is_nowhere(stub: Stubbed) -> None:
    assert (await stub.ask("print")).code == ""
    assert "tenant" not in stub.log.read_text()


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"path": 5}', b"\xff\xfe"])
async def test_what_is_no_question_has_no_verdict(stub: Stubbed, data: bytes) -> None:
    assert decode_verdict(await stub.send(data)).code == UNKNOWN


async def test_clients_that_leave_do_no_harm(stub: Stubbed) -> None:
    for _ in range(3):
        _, writer = await asyncio.open_unix_connection(str(stub.path))
        writer.close()
    _, writer = await asyncio.open_unix_connection(str(stub.path))
    writer.write(encode(Question("/v1/chat/completions", {"do": "explode"})))
    writer.write_eof()
    writer.close()
    assert (await stub.ask("pass")).code == ""


async def test_it_ends_when_nobody_asks(tmp_path: Path) -> None:
    async for stub in started(tmp_path, 1):
        assert (await stub.ask("pass")).code == ""
        assert await asyncio.wait_for(stub.process.wait(), 60) == 0
        assert not stub.path.exists()


def spec_of(model: str) -> EngineSpec:
    return EngineSpec(VLLM, model, "m", "auto", 2048, 16, 8, 16, 64, 2**28)


def running() -> list[psutil.Process]:
    """Return this process's checkers in the order of their starts."""
    children = [child for child in psutil.Process().children() if STUB in command_of(child)]
    return sorted(children, key=lambda child: child.create_time())


async def test_one_that_ends_just_now_does_not_stop_its_clients_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a checker ends, connections are refused at once: its socket ends before its process."""
    monkeypatch.setattr(client, "IDLE_S", 0.1)
    question = Question("/v1/chat/completions", {"do": "pass"})
    async with Checkers(tmp_path, None, module=STUB).kept() as checkers:
        assert (await checkers.check(spec_of(LINGERS), question)).code == ""
        (ending,) = running()
        await until(lambda: not list(tmp_path.rglob("*.sock")), every_s=0.01)
        assert ending.is_running()
        assert (await checkers.check(spec_of(LINGERS), question)).code == ""
        assert ending not in running()


async def test_a_question_that_died_with_its_checker_is_asked_again(tmp_path: Path) -> None:
    spec = spec_of("no-model")
    async with Checkers(tmp_path, None, module=STUB).kept() as checkers:
        asked = [asyncio.create_task(checkers.check(spec, Question("/v1/chat/completions", {"do": "sleep"}))) for _ in range(2)]
        await until(lambda: running() and len(running()[0].children()) == 2)
        (killed,) = running()
        waiting = asyncio.create_task(checkers.check(spec, Question("/v1/chat/completions", {"do": "pass"})))
        await asyncio.sleep(0)
        killed.kill()
        assert (await waiting).code == ""
        assert {verdict.code for verdict in await asyncio.gather(*asked)} == {UNKNOWN}
        assert len(running()) == 1
        assert killed not in running()


async def test_one_that_starts_slowly_is_left_alone_and_one_that_stands_still_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"START_S": 1.0, "ANSWER_S": 0.5, "STILL_S": 2.0, "LOOK_S": 0.2}.items():
        monkeypatch.setattr(client, name, seconds)
    spec, question = spec_of(SLOW), Question("/v1/chat/completions", {"do": "pass"})
    async with Checkers(tmp_path, None, module=STUB).kept() as checkers:
        for _ in range(4):  # longer than a checker may stand still
            with pytest.raises(NoVerdict, match="TimeoutError"):
                await checkers.check(spec, question)
        (slow,) = running()
        slow.suspend()

        async def found() -> bool:
            with pytest.raises(NoVerdict) as error:
                await checkers.check(spec, question)
            return "stood still" in str(error.value)

        await until(found)
        (tmp_path / "go").touch()
        monkeypatch.setattr(client, "START_S", 60.0)
        monkeypatch.setattr(client, "ANSWER_S", 60.0)
        assert (await checkers.check(spec, question)).code == ""
        assert slow not in running()

"""The pipe between an engine and its log."""

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lmaas.engine.log import pump, seal
from lmaas.engine.log.pump import EngineLog
from tests.support.conditions import until

SECRET = "SECRETTEXT"


@pytest.fixture
async def engine_log(tmp_path: Path) -> AsyncIterator[EngineLog]:
    """A log with a reader."""
    with EngineLog(tmp_path / "replica" / "engine.log").opened() as opened:
        yield opened


@pytest.fixture
def engine(engine_log: EngineLog) -> Iterator[int]:
    """The standard error of an engine."""
    writer = engine_log.writer()
    yield writer
    os.close(writer)


def mark_of(engine_log: EngineLog) -> str:
    mark = seal.read_seal(str(engine_log.seal_path))
    assert mark is not None
    return mark


async def test_output_arrives_by_itself(engine_log: EngineLog, engine: int) -> None:
    os.write(engine, b"starting\nvllm: error: no such option\n")
    await until(lambda: "no such option" in engine_log.path.read_text())
    assert engine_log.contains("starting")
    assert not engine_log.contains("stopping")


async def test_what_was_written_before_the_seal_is_kept_whole(engine_log: EngineLog, engine: int) -> None:
    os.write(engine, b"before\n")
    assert seal.read_seal(str(engine_log.seal_path)) is None
    engine_log.seal()
    os.write(engine, f"after {SECRET}\n{mark_of(engine_log)}record\n".encode())
    engine_log.seal()
    assert engine_log.tail(1000).decode().splitlines() == [
        "before",
        "record",
        "lmaas: 1 lines (17 bytes) of the engine's output were left out",
    ]


async def test_a_forked_engine_opens_the_pipe_by_name(engine_log: EngineLog) -> None:
    # zygote/server.py opens it in the same way.
    output = os.open(engine_log.pipe, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    os.write(output, b"hello\n")
    os.close(output)
    assert engine_log.tail(100) == b"hello\n"


async def test_a_flood_does_not_hold_up_an_engine_or_the_event_loop(engine_log: EngineLog) -> None:
    engine_log.seal()
    script = f"import os\nfor _ in range(200): os.write(2, b'{SECRET} ' * 2600 + b'\\n')"
    writer = engine_log.writer()
    turns = 0
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=writer)
    os.close(writer)
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        turns += 1
        await asyncio.sleep(0)
    assert ended.result() == 0
    assert turns > 10
    engine_log.settle()
    text = engine_log.path.read_text()
    assert SECRET not in text
    assert len(text) < 300


async def test_the_note_comes_without_more_output(engine_log: EngineLog, engine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "NOTE_S", 0.05)
    engine_log.seal()
    os.write(engine, b"chatter\n")
    await until(lambda: "1 lines" in engine_log.path.read_text())
    os.write(engine, b"chatter\nchatter\n")
    await until(lambda: "2 lines" in engine_log.path.read_text())


async def test_logs_are_rotated(engine_log: EngineLog, engine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "ROTATE_BYTES", 10_000)
    for number in range(100):
        os.write(engine, f"line {number} {'x' * 500}\n".encode())
        engine_log.settle()
    assert engine_log.path.stat().st_size <= 10_000
    assert engine_log.predecessor.stat().st_size <= 10_000
    assert {path.name for path in engine_log.path.parent.iterdir()} == {"engine.log", "engine.log.1", "engine.pipe"}
    # No byte is lost between the two.
    lines = [int(line.split()[1]) for line in (engine_log.predecessor.read_text() + engine_log.path.read_text()).splitlines()]
    assert lines == list(range(lines[0], 100))
    assert engine_log.contains(f"line {lines[0]} ")
    tail = engine_log.tail(9000)
    assert len(tail) == 9000
    assert tail.endswith(engine_log.path.read_bytes())


async def test_a_full_disk_holds_up_nothing(
    engine_log: EngineLog, engine: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(3):
            os.writev(engine, [b"lost\n"])
            engine_log.settle()
    assert caplog.text.count("cannot be written") == 1
    os.write(engine, b"kept\n")
    assert engine_log.tail(100) == b"kept\n"


async def test_a_log_whose_engine_cannot_be_told_keeps_tenants_text_out(
    engine_log: EngineLog, engine: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = seal.write_seal

    def full(path: Path, mark: str) -> None:
        monkeypatch.setattr(pump, "write_seal", real)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pump, "NOTE_S", 0.05)
    monkeypatch.setattr(pump, "write_seal", full)
    engine_log.seal()
    os.write(engine, f"(EngineCore pid=1) ERROR {SECRET}\n".encode())
    await until(engine_log.seal_path.exists)
    os.write(engine, f"{mark_of(engine_log)}record\n".encode())
    text = engine_log.tail(1000).decode()
    assert "record" in text
    assert SECRET not in text
    assert "left out for now" in caplog.text


async def test_a_second_engine_at_the_same_place_starts_unsealed(tmp_path: Path) -> None:
    for number in range(2):
        with EngineLog(tmp_path / "engine.log").opened() as engine_log:
            assert not engine_log.seal_path.exists()
            writer = engine_log.writer()
            os.write(writer, f"start {number}\n".encode())
            os.close(writer)
            engine_log.seal()
        assert not engine_log.pipe.exists()
    assert (tmp_path / "engine.log").read_text() == "start 0\nstart 1\n"

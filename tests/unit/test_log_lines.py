"""Lines of a log are written in groups, and a slow reader delays no request."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmaas.log_lines import PORTION_BYTES, line_writer, portions
from tests.support.conditions import until


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for each in (reader, writer):
        os.close(each)


async def test_lines_arrive_in_order_soon_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("ab") as file, line_writer(file.fileno()) as lines:
        lines.add("1\n")
        lines.add("2 ü\n")
        await until(lambda: path.read_text() == "1\n2 ü\n")
        lines.add("3\n")
    assert path.read_text() == "1\n2 ü\n3\n"
    assert lines.dropped == 0


async def test_a_log_that_is_not_read_delays_nothing_and_loses_counted_lines(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmaas.group_writer.EVERY_S", 0.001)
    monkeypatch.setattr("lmaas.group_writer.CLOSE_S", 0.01)
    reader, writer = pipe
    full = fill(writer)
    with line_writer(writer, max_waiting=50) as lines:
        lines.add("first\n")
        await asyncio.sleep(0.1)  # the thread has it, and cannot write it
        for _ in range(60):
            lines.add("x\n")
        assert lines.dropped == 10
    got = b""
    while len(got) < full + len(b"first\n") + 50 * 2:
        got += await asyncio.to_thread(os.read, reader, 1 << 20)
    assert got[full:] == b"first\n" + 50 * b"x\n"


def fill(pipe: int) -> int:
    """Write to a pipe until it is full, and return the number of bytes."""
    os.set_blocking(pipe, False)
    written = 0
    while True:
        try:
            written += os.write(pipe, b"-" * 4096)
        except BlockingIOError:
            os.set_blocking(pipe, True)
            return written


async def test_a_file_that_cannot_be_written_costs_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    with path.open("rb") as file, line_writer(file.fileno()) as lines:
        lines.add("1\n")
        lines.add("2\n")
        await until(lambda: lines.dropped == 2)


def test_portions_have_whole_lines_and_are_small_enough_for_a_pipe() -> None:
    lines = [f"{'ü' * (number % 200)}\n" for number in range(500)]
    found = list(portions(lines))
    assert b"".join(found).decode() == "".join(lines)
    assert all(len(portion) <= PORTION_BYTES and portion.endswith(b"\n") for portion in found)
    assert len(found) < 30
    assert list(portions(["y" * 5000 + "\n", "z\n"])) == [b"y" * 5000 + b"\n", b"z\n"]
    assert list(portions([])) == []

"""Processes that end are started again: at once after the first end, after growing pauses if they do not last."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from lmaas.errors import SettingsError
from lmaas.up import keeping
from lmaas.up.keeping import ending, keep_running, pause_s
from tests.support.conditions import until


@pytest.mark.parametrize(("failures", "pause"), [(0, 0), (1, 0), (2, 0.5), (3, 1), (4, 2), (7, 16), (8, 30), (1000, 30)])
def test_pauses_grow_up_to_a_bound(failures: int, pause: float) -> None:
    assert pause_s(failures) == pause


@pytest.mark.parametrize(
    ("code", "words"), [(0, "ended with code 0"), (3, "ended with code 3"), (-9, "was ended by SIGKILL"), (-200, "was ended by signal 200")]
)
def test_endings_in_words(code: int, words: str) -> None:
    assert ending(code) == words


class Process:
    """A process that runs until `code` is set."""

    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Thing:
    """A thing to keep running. Each entry of `launches` is the result of a launch: "works", "ends" at once, or an error."""

    title = "The thing"

    def __init__(self, *launches: str | SettingsError) -> None:
        self.launches = list(launches)
        self.process = Process()
        self.works = True

    def launch(self) -> None:
        outcome = self.launches.pop(0)
        if isinstance(outcome, SettingsError):
            raise outcome
        self.process, self.works = Process(), outcome == "works"
        if outcome == "ends":
            self.process.code = 1

    def answers(self) -> bool:
        return self.works

    def failure(self) -> str:
        return "the disk is full. Its log is x."


@asynccontextmanager
async def kept(thing: Thing) -> AsyncIterator[list[str]]:
    said: list[str] = []
    task = asyncio.create_task(keep_running(thing, said.append))
    yield said
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_it_is_started_again_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "PAUSE_S", 0.001)
    thing = Thing("works", "ends", SettingsError("It cannot be started."), "works")
    async with kept(thing) as said:
        thing.process.code = -9
        await until(lambda: len(said) == 2)
        assert said == ["The thing was ended by SIGKILL. It is started again now.", "The thing works again after 0.0 s."]
        said.clear()
        thing.process.code = 1
        await until(lambda: len(said) == 4)
    assert said == [
        "The thing ended with code 1. It is started again in 0.001 s.",
        "The thing did not start: the disk is full. Its log is x. The next try is in 0.002 s.",
        "The thing did not start: It cannot be started. The next try is in 0.004 s.",
        "The thing works again after 0.0 s.",
    ]


async def test_it_can_be_told_to_end_while_a_start_takes_long() -> None:
    thing = Thing("hangs")
    thing.process.code = -9
    async with kept(thing) as said:
        await until(lambda: not thing.launches)
    assert said == ["The thing was ended by SIGKILL. It is started again now."]

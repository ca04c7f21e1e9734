"""Starts a process again whenever it ends."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from lmaas.errors import SettingsError

LOOK_EVERY_S = 0.1
#: The pause before the second start in a row, which is doubled for each further one, up to the last.
PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
#: A process that ran for this long had started well.
LASTED_S = 60.0


class Kept(Protocol):
    """What can be kept running: an embedded server, or a gateway or controller of this stack."""

    @property
    def title(self) -> str:
        """What it is called at the beginning of a message."""

    @property
    def process(self) -> Any:
        """Its process (a Popen), or None before the first launch."""

    def launch(self) -> None:
        """Start its process, in the main thread, and return at once. Raises SettingsError."""

    def answers(self) -> bool:
        """Return whether it can be used now. May take a few seconds."""

    def failure(self) -> str:
        """Return why it ended or does not answer, and where its log is."""


def pause_s(failures: int) -> float:
    """Return how long to wait before the next start. `failures` counts the ends in a row, each soon after its start; the first is 1."""
    return 0.0 if failures <= 1 else min(MAX_PAUSE_S, PAUSE_S * 2 ** (failures - 2))


async def keep_running(kept: Kept, say: Callable[[str], None]) -> NoReturn:
    """Start `kept` again whenever its process ends, and say so. Cancel this task to end that; it leaves the process as it is."""
    now = asyncio.get_running_loop().time
    failures = 0
    while True:
        began = now()
        while (code := kept.process.poll()) is None:  # noqa: ASYNC110 (a process has no event)
            await asyncio.sleep(LOOK_EVERY_S)
        failures = 1 if now() - began > LASTED_S else failures + 1
        say(f"{kept.title} {ending(code)}. It is started again {_when(pause_s(failures))}.")
        while True:
            await asyncio.sleep(pause_s(failures))
            began = now()
            why = await _start(kept)
            if why is None:
                say(f"{kept.title} works again after {now() - began:.1f} s.")
                break
            failures += 1
            say(f"{kept.title} did not start: {why} The next try is {_when(pause_s(failures))}.")


async def _start(kept: Kept) -> str | None:
    """Start a process and wait until it can be used; return why it cannot."""
    try:
        kept.launch()
    except SettingsError as error:
        return error.message
    while not await asyncio.to_thread(kept.answers):
        if kept.process.poll() is not None:
            return kept.failure()
        await asyncio.sleep(LOOK_EVERY_S / 2)
    return None


def ending(code: int) -> str:
    """Describe the exit code of a process."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _when(pause: float) -> str:
    return "now" if pause == 0 else f"in {pause:g} s"

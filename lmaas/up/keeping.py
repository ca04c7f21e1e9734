"""Restarts processes that end."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from lmaas.errors import SettingsError

LOOK_EVERY_S = 0.1
#: The pause before the second start in a row. It doubles for each further start, up to the maximum.
PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
#: A process that ran for this long counts as started well.
LASTED_S = 60.0


class Kept(Protocol):
    """A process that can be kept running: an embedded server, or a gateway or controller of this stack."""

    @property
    def title(self) -> str:
        """The name at the beginning of a message."""

    @property
    def process(self) -> Any:
        """The process (a Popen), or None before the first launch."""

    def launch(self) -> None:
        """Start the process in the main thread, and return immediately. Raises SettingsError."""

    def answers(self) -> bool:
        """Return whether the process is ready for use. May take a few seconds."""

    def failure(self) -> str:
        """Return the reason why the process ended or does not respond, and the path of its log."""


def pause_s(failures: int) -> float:
    """Return the seconds to wait before the next start. `failures` is the number of consecutive ends soon after a start, at least 1."""
    return 0.0 if failures <= 1 else min(MAX_PAUSE_S, PAUSE_S * 2 ** (failures - 2))


async def keep_running(kept: Kept, say: Callable[[str], None]) -> NoReturn:
    """Restart `kept` whenever its process ends, and report each end. Cancelling this task leaves the process running."""
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
    """Start a process and wait until it is ready. Return the reason if it fails."""
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

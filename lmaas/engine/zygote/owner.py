"""Looks after the zygote of a home folder: starts it, and replaces one that ended, is stuck, or was started with other facts."""

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lmaas.engine.zygote import wire
from lmaas.engine.zygote.policy import stuck
from lmaas.engine.zygote.progress import Sight, Watch, intend, is_zygote, plain_imports, running

log = logging.getLogger(__name__)

#: The interval at which its owner checks it.
EVERY_S = 2.0
#: One that ended is started again after this long, doubled for each that did not last.
RESTART_S, RESTART_MAX_S = 1.0, 300.0
#: One that lasted this long was no failure.
LASTED_S = 60.0
HELLO_S = 0.5
#: How old the facts about our own files may be.
FACTS_S = 60.0
#: How long a killed process may take to be gone.
STOP_S = 5.0


class ZygoteOwner:
    """Looks after the zygote of `home`. `start` starts one, `facts` returns what it must have been started with."""

    def __init__(
        self,
        home: Path,
        start: Callable[[], "subprocess.Popen[bytes]"],
        facts: Callable[[], Mapping[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home, self._start, self._facts, self._clock = home, start, facts, clock
        self._child: subprocess.Popen[bytes] | None = None
        self._checked_at = self._started = self._answered = self._knew = float("-inf")
        self._watch = Watch(home, clock)
        #: What was seen last of the zygote.
        self.seen = Sight()
        self._known: Mapping[str, str] = {}
        self._failures = 0
        self._intent = (float("-inf"), "")
        self._checking: asyncio.Task[None] | None = None

    def tend(self) -> "asyncio.Task[None]":
        """Call `ensure` in a task, which is returned: for callers that must not wait for a zygote that is slow to answer."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self.ensure(), name="zygote")
            self._checking.add_done_callback(_tell)
        return self._checking

    async def ensure(self) -> None:
        """Start the zygote if none runs, replace one that is stuck, and tell it that it is needed.

        A call within EVERY_S seconds of the last one does nothing.
        """
        now = self._clock()
        if now - self._checked_at < EVERY_S:
            return
        self._checked_at = now
        try:
            await asyncio.to_thread(self._check)
        except OSError as error:
            # Engines start plainly meanwhile.
            log.warning("no zygote", extra={"action": "zygote", "detail": repr(error)})

    def stop(self) -> None:
        """End the zygote, also one that another process started."""
        stop(self._home)
        if self._child is not None:
            self._child.kill()
            self._child.wait(STOP_S)

    def _check(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        self.seen = seen = self._watch.look()
        if seen.pid == 0:
            self._begin()
        elif seen.serves and self._answers():
            self._watch.answered()
        elif reason := stuck(seen):
            self._kill(seen.pid, reason)
        self._intend()

    def _answers(self) -> bool:
        """Whether it answers, or is about to end. One with other facts is told to end."""
        with wire.channel() as connection:
            connection.settimeout(HELLO_S)
            try:
                with wire.short_path(wire.folder(self._home) / wire.SOCKET) as path:
                    connection.connect(path)
                hello = wire.receive(connection) or {}
            except (TimeoutError, BlockingIOError):
                return False  # it stands still, or so many are in line before us
            except (FileNotFoundError, ConnectionError):
                return True  # it is ending; the next look finds out
            self._answered = self._clock()
            if differs := wire.difference(self._wanted(), hello.get("facts", {})):
                log.warning("the zygote is replaced", extra={"action": "zygote", "detail": f"it was started with another {differs}"})
                wire.send(connection, {"do": "stop"})
            return True

    def _begin(self) -> None:
        """Start the zygote, unless the last one ended too soon, or an engine that was started plainly still imports."""
        now = self._clock()
        self._failures = 0 if self._answered - self._started > LASTED_S else self._failures
        if self._child is None and now >= self._next() and not plain_imports(self._home):
            self._failures += 1
            self._knew = float("-inf")
            self._started = self._answered = now
            self._child = self._start()

    def _next(self) -> float:
        """When the next zygote may be started if there is none."""
        return self._started + (min(RESTART_MAX_S, RESTART_S * 2**self._failures) if self._failures else 0.0)

    def _intend(self) -> None:
        """Have starts that wait for a zygote know what they can expect of us."""
        intent = (self._next(), wire.digest(self._wanted()))
        if intent != self._intent:
            intend(self._home, max(0.0, intent[0] - self._clock()), intent[1])
            self._intent = intent

    def _kill(self, pid: int, reason: str) -> None:
        log.error("the zygote is stuck and is killed", extra={"action": "zygote", "detail": f"pid {pid}: {reason}"})
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _wanted(self) -> Mapping[str, str]:
        """The facts, found again every FACTS_S seconds: that looks at every file of ours."""
        if self._clock() - self._knew > FACTS_S:
            self._known, self._knew = self._facts(), self._clock()
        return self._known


def _tell(checking: "asyncio.Task[None]") -> None:
    if not checking.cancelled() and (error := checking.exception()) is not None:
        log.error("the zygote could not be checked", exc_info=error, extra={"action": "zygote"})


def peer(connection: socket.socket) -> int:
    """The process that listens at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def stop(home: Path) -> None:
    """End the zygote of a home folder, if there is one. What it forked goes on."""
    for pid in {listener(home), running(home)} - {0}:
        # Whatever it does just now, importing or waiting: it holds nothing that a kill could harm.
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if is_zygote(pid, home):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], STOP_S)
            finally:
                os.close(pidfd)


def listener(home: Path) -> int:
    """The process id of the zygote that listens in a home folder; 0 if none does."""
    with wire.channel() as connection, contextlib.suppress(OSError):
        connection.settimeout(HELLO_S)
        with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
            connection.connect(path)
        return peer(connection)
    return 0

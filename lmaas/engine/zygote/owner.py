"""Manages the zygote of a home folder: starts it, and replaces a zygote that ended, is stuck, or was started with other facts."""

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

#: The interval between two checks of the zygote.
EVERY_S = 2.0
#: The delay before a zygote that ended is started again. It doubles with each zygote that ended early, up to the maximum.
RESTART_S, RESTART_MAX_S = 1.0, 300.0
#: A zygote that ran for longer than this does not count as a failure.
LASTED_S = 60.0
HELLO_S = 0.5
#: The maximum age of the cached facts about the code of lmaas.
FACTS_S = 60.0
#: The time that a killed process may take to end.
STOP_S = 5.0


class ZygoteOwner:
    """Manages the zygote of `home`. `start` starts a zygote, and `facts` returns the facts with which it must have been started."""

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
        #: The result of the last check of the zygote.
        self.seen = Sight()
        self._known: Mapping[str, str] = {}
        self._failures = 0
        self._intent = (float("-inf"), "")
        self._checking: asyncio.Task[None] | None = None

    def tend(self) -> "asyncio.Task[None]":
        """Run `ensure` in a task and return the task, for callers that must not wait for a slow zygote."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self.ensure(), name="zygote")
            self._checking.add_done_callback(_tell)
        return self._checking

    async def ensure(self) -> None:
        """Start the zygote if none runs, replace a zygote that is stuck, and reset the idle time of one that serves.

        A call within EVERY_S seconds of the last one has no effect.
        """
        now = self._clock()
        if now - self._checked_at < EVERY_S:
            return
        self._checked_at = now
        try:
            await asyncio.to_thread(self._check)
        except OSError as error:
            # Until a zygote runs, engines start plainly.
            log.warning("no zygote", extra={"action": "zygote", "detail": repr(error)})

    def stop(self) -> None:
        """End the zygote, including one that another process started."""
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
        """Return whether the zygote responds or is about to end. A zygote with other facts is stopped."""
        with wire.channel() as connection:
            connection.settimeout(HELLO_S)
            try:
                with wire.short_path(wire.folder(self._home) / wire.SOCKET) as path:
                    connection.connect(path)
                hello = wire.receive(connection) or {}
            except (TimeoutError, BlockingIOError):
                return False  # it has stalled, or too many requests are queued before this one
            except (FileNotFoundError, ConnectionError):
                return True  # it is about to end; the next check finds that it has ended
            self._answered = self._clock()
            if differs := wire.difference(self._wanted(), hello.get("facts", {})):
                log.warning("the zygote is replaced", extra={"action": "zygote", "detail": f"it was started with another {differs}"})
                wire.send(connection, {"do": "stop"})
            return True

    def _begin(self) -> None:
        """Start the zygote, unless the last one ended too recently or a plainly started engine is still importing."""
        now = self._clock()
        self._failures = 0 if self._answered - self._started > LASTED_S else self._failures
        if self._child is None and now >= self._next() and not plain_imports(self._home):
            self._failures += 1
            self._knew = float("-inf")
            self._started = self._answered = now
            self._child = self._start()

    def _next(self) -> float:
        """Return the earliest time at which the next zygote may be started."""
        return self._started + (min(RESTART_MAX_S, RESTART_S * 2**self._failures) if self._failures else 0.0)

    def _intend(self) -> None:
        """Publish when the next zygote may be started and with which facts, for the engine starts that wait for it."""
        intent = (self._next(), wire.digest(self._wanted()))
        if intent != self._intent:
            intend(self._home, max(0.0, intent[0] - self._clock()), intent[1])
            self._intent = intent

    def _kill(self, pid: int, reason: str) -> None:
        log.error("the zygote is stuck and is killed", extra={"action": "zygote", "detail": f"pid {pid}: {reason}"})
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _wanted(self) -> Mapping[str, str]:
        """Return the facts. They are computed at most every FACTS_S seconds, because that reads the modification time of each module of
        lmaas."""
        if self._clock() - self._knew > FACTS_S:
            self._known, self._knew = self._facts(), self._clock()
        return self._known


def _tell(checking: "asyncio.Task[None]") -> None:
    if not checking.cancelled() and (error := checking.exception()) is not None:
        log.error("the zygote could not be checked", exc_info=error, extra={"action": "zygote"})


def peer(connection: socket.socket) -> int:
    """Return the id of the process that listens at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def stop(home: Path) -> None:
    """End the zygote of a home folder, if there is one. The processes that it forked continue."""
    for pid in {listener(home), running(home)} - {0}:
        # The zygote holds no state that a kill could damage, whether it is importing or waiting.
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if is_zygote(pid, home):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], STOP_S)
            finally:
                os.close(pidfd)


def listener(home: Path) -> int:
    """Return the process id of the zygote that listens in a home folder, or 0 if none listens."""
    with wire.channel() as connection, contextlib.suppress(OSError):
        connection.settimeout(HELLO_S)
        with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
            connection.connect(path)
        return peer(connection)
    return 0

"""Whoever wants a zygote to be there: looks after it, and starts it again when it is gone."""

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

log = logging.getLogger(__name__)

#: How often its owner looks after it.
EVERY_S = 2.0
#: How long it may be mute, importing or not, before it is taken for stuck and killed.
MUTE_S = 90.0
#: One that ended is started again after this long, doubled for each that did not last.
RESTART_S, RESTART_MAX_S = 1.0, 300.0
#: One that lasted this long was no failure.
LASTED_S = 60.0
HELLO_S = 0.5
#: How old what we know of our own files may be.
FACTS_S = 60.0
#: How long a killed process may take to be gone.
STOP_S = 5.0


class ZygoteOwner:
    """Looks after the zygote of `home`. `start` starts one, `facts` says what it must have been started with."""

    def __init__(
        self,
        home: Path,
        start: Callable[[], "subprocess.Popen[bytes]"],
        facts: Callable[[], Mapping[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._home, self._start, self._facts, self._clock = home, start, facts, clock
        self._child: subprocess.Popen[bytes] | None = None
        self._looked = self._started = self._answered = self._knew = float("-inf")
        #: Which process was found mute, and when first. Nobody is blamed for the time before we looked.
        self._mute: tuple[int, float] | None = None
        self._known: Mapping[str, str] = {}
        self._failures = 0
        self._looking: asyncio.Task[None] | None = None

    def tend(self) -> "asyncio.Task[None]":
        """Run `ensure` as a task, one at a time, and return it: a caller need not wait for a zygote that is slow to answer."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.ensure(), name="zygote")
            self._looking.add_done_callback(_tell)
        return self._looking

    async def ensure(self) -> None:
        """See that the zygote runs, or start it; does nothing if it was called a moment ago. It tells the zygote that it is needed."""
        now = self._clock()
        if now - self._looked < EVERY_S:
            return
        self._looked = now
        try:
            await asyncio.to_thread(self._look)
        except OSError as error:
            # Engines start plainly meanwhile.
            log.warning("no zygote", extra={"action": "zygote", "detail": repr(error)})

    def _look(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        with wire.channel() as connection:
            connection.settimeout(HELLO_S)
            try:
                with wire.short_path(wire.folder(self._home) / wire.SOCKET) as path:
                    connection.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                self._begin()
                return
            except BlockingIOError:
                # So many stand in line already: each of our looks, for one that is mute.
                self._found_mute(holder(self._home))
                return
            try:
                hello = wire.receive(connection) or {}
            except TimeoutError:
                self._found_mute(peer(connection))
                return
            except ConnectionError:
                return  # it is ending; the next look finds out
            self._answered, self._mute = self._clock(), None
            if differs := wire.difference(self._wanted(), hello.get("facts", {})):
                log.warning("the zygote is replaced", extra={"action": "zygote", "detail": f"it was started with another {differs}"})
                wire.send(connection, {"do": "stop"})

    def _begin(self) -> None:
        now = self._clock()
        self._failures = 0 if self._answered - self._started > LASTED_S else self._failures
        wait = 0.0 if self._failures == 0 else min(RESTART_MAX_S, RESTART_S * 2**self._failures)
        if self._child is not None or now - self._started < wait:
            return  # it has not come so far, or not for long
        self._failures += 1
        self._knew = float("-inf")
        self._started = self._answered = now
        self._child = self._start()

    def _found_mute(self, pid: int) -> None:
        now = self._clock()
        if self._mute is None or self._mute[0] != pid:
            self._mute = (pid, now)
        if now - self._mute[1] > MUTE_S and _is_zygote(pid, self._home):
            log.error("the zygote is stuck and is killed", extra={"action": "zygote", "detail": f"pid {pid}"})
            self._mute = None
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _wanted(self) -> Mapping[str, str]:
        """The facts, found again now and then: that looks at every file of ours."""
        if self._clock() - self._knew > FACTS_S:
            self._known, self._knew = self._facts(), self._clock()
        return self._known


def _tell(looking: "asyncio.Task[None]") -> None:
    if not looking.cancelled() and (error := looking.exception()) is not None:
        log.error("the zygote could not be looked after", exc_info=error, extra={"action": "zygote"})


def peer(connection: socket.socket) -> int:
    """The process that listens at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def stop(home: Path) -> None:
    """End the zygote of a home folder, if there is one. What it forked goes on."""
    for pid in {listener(home), holder(home), _last_started(home)} - {0}:
        # Whatever it does just now, importing or waiting: it holds nothing that a kill could harm.
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if _is_zygote(pid, home):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], STOP_S)
            finally:
                os.close(pidfd)


def listener(home: Path) -> int:
    """Return the pid of the zygote that listens for this home, or 0."""
    with wire.channel() as connection, contextlib.suppress(OSError):
        connection.settimeout(HELLO_S)
        with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
            connection.connect(path)
        return peer(connection)
    return 0


def _last_started(home: Path) -> int:
    """It may not listen yet, and may never: if there was one already."""
    return _number(wire.folder(home) / wire.PROCESS)


def holder(home: Path) -> int:
    """Return the pid of the zygote that holds the home's lock, or held it last: it cannot always be asked. 0 if there was none."""
    return _number(wire.folder(home) / wire.LOCK)


def _number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _is_zygote(pid: int, home: Path) -> bool:
    """Whether that is what the process's command line says; not if it is gone, and its number belongs to another."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") + b" "
        return f"lmaas.engine.zygote {home} ".encode() in command
    return False

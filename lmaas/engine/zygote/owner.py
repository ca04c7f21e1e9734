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
        self._looked = self._started = self._answered = float("-inf")
        self._failures = 0

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
            try:
                hello = wire.receive(connection) or {}
            except TimeoutError:
                self._mute(connection)
                return
            except ConnectionError:
                return  # it is ending; the next look finds out
            self._answered = self._clock()
            if differs := wire.difference(self._facts(), hello.get("facts", {})):
                log.warning("the zygote is replaced", extra={"action": "zygote", "detail": f"it was started with another {differs}"})
                wire.send(connection, {"do": "stop"})

    def _begin(self) -> None:
        now = self._clock()
        self._failures = 0 if self._answered - self._started > LASTED_S else self._failures
        wait = 0.0 if self._failures == 0 else min(RESTART_MAX_S, RESTART_S * 2**self._failures)
        if self._child is not None or now - self._started < wait:
            return  # it has not come so far, or not for long
        self._failures += 1
        self._started = self._answered = now
        self._child = self._start()

    def _mute(self, connection: socket.socket) -> None:
        pid = peer(connection)
        if self._clock() - max(self._answered, self._started) > MUTE_S and pid > 0:
            log.error("the zygote is stuck and is killed", extra={"action": "zygote", "detail": f"pid {pid}"})
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def peer(connection: socket.socket) -> int:
    """The process that listens at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def stop(home: Path) -> None:
    """End the zygote of a home folder, if there is one. What it forked goes on."""
    for pid in {_listener(home), _last_started(home)} - {0}:
        # Whatever it does just now, importing or waiting: it holds nothing that a kill could harm.
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if f"lmaas.engine.zygote {home}".encode() in _command(pid):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], STOP_S)
            finally:
                os.close(pidfd)


def _listener(home: Path) -> int:
    with wire.channel() as connection, contextlib.suppress(OSError):
        connection.settimeout(HELLO_S)
        with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
            connection.connect(path)
        return peer(connection)
    return 0


def _last_started(home: Path) -> int:
    """It may not listen yet."""
    with contextlib.suppress(OSError, ValueError):
        return int((wire.folder(home) / wire.PROCESS).read_text())
    return 0


def _command(pid: int) -> bytes:
    """With spaces between the arguments. Empty if the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    return b""

"""The keeper of one engine. The zygote forks it. It kills the engine when the engine's supervisor ends, and reports the engine's exit
code."""

import contextlib
import os
import select
import signal
import socket

from lmaas.engine.zygote import wire


def keep(engine: int, connection: socket.socket) -> None:
    """Wait until the engine ends, or until the other side closes `connection`. The engine is a child that leads its own session. In both
    cases, kill every process of its process group before returning."""
    pidfd = os.pidfd_open(engine)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(connection, select.POLLIN)
    wanted = True
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if pidfd in ready:
            break
        with contextlib.suppress(OSError, ValueError, TypeError):
            if wire.receive(connection) is not None:
                continue
        # The supervisor has ended, so the engine must end.
        wanted = False
        kill_group(engine)
        poll.unregister(connection)
    kill_group(engine)
    _, status = os.waitpid(engine, 0)
    if wanted:
        with contextlib.suppress(OSError):
            wire.send(connection, {"exit": os.waitstatus_to_exitcode(status)})


def kill_group(leader: int) -> None:
    """Kill a process that has not been reaped, and its process group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(leader, signal.SIGKILL)

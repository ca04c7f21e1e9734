"""The keeper of one engine: forked by the zygote, it ends the engine when its supervisor ends, and reports the engine's exit code."""

import contextlib
import os
import select
import signal
import socket

from lmaas.engine.zygote import wire


def keep(engine: int, connection: socket.socket) -> None:
    """Stay until the engine, a child that leads a session of its own, has ended or `connection` is closed by the other side. Either
    way nothing of the engine's process group is left."""
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
        # The supervisor is gone, so the engine must end.
        wanted = False
        kill_group(engine)
        poll.unregister(connection)
    kill_group(engine)
    _, status = os.waitpid(engine, 0)
    if wanted:
        with contextlib.suppress(OSError):
            wire.send(connection, {"exit": os.waitstatus_to_exitcode(status)})


def kill_group(leader: int) -> None:
    """Kill a process that was not waited for yet, and its group."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(leader, signal.SIGKILL)

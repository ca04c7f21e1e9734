"""Starts a zygote, and requests forked processes from it."""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmaas.engine.zygote import wire
from lmaas.engine.zygote.policy import why_plain
from lmaas.engine.zygote.progress import Sight, Watch

log = logging.getLogger(__name__)

#: One thread in every library, because a thread pool of OpenMP or BLAS does not survive a fork. Engines set their own numbers (see
#: preload.py).
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "SPT_NOENV": "1"}
#: Reserves space for process names: the name that `ps` shows cannot be longer than the command line with which the process started.
ROOM_FOR_NAMES = " " * 400
#: The time for which a supervisor's start waits for a zygote. A plain start of a supervisor takes about a second.
SUPERVISOR_FORK_TIMEOUT_S = 0.3
#: The interval between checks of a zygote that does not respond.
POLL_S = 0.5


class NoZygote(Exception):
    """The zygote cannot fork the process, for the given reason. The caller starts it plainly."""


class _NotThere(Exception):
    """No zygote listens, or it ended during the request. Another one may start."""


class _Differs(NoZygote):
    """The zygote was started with other facts. Its owner replaces it, unless the owner was configured with the same facts."""


@dataclass(frozen=True, slots=True)
class Order:
    """A process to fork. It runs `main()` of `module` with these arguments and this environment, and nothing of the zygote's own. Its
    output is appended to `log`. With `kept`, it ends when the process that ordered it ends."""

    module: str
    arguments: list[str]
    environment: Mapping[str, str]
    log: Path
    kept: bool


@dataclass(frozen=True, slots=True)
class Fork:
    """A forked process. `connection` leads to its keeper if the process is kept. The caller must close it."""

    pid: int
    connection: socket.socket


async def fork(home: Path, order: Order, facts: Mapping[str, str], timeout_s: float) -> Fork:
    """Request a forked process from the zygote of `home`, and wait at most `timeout_s` seconds. A process that is not kept waits until `go`
    is called.

    Raises NoZygote.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _fork(home, order, facts)
    except (TimeoutError, _NotThere) as error:
        raise NoZygote(f"the zygote did not answer: {error!r}") from error


async def fork_when_there(home: Path, order: Order, facts: Mapping[str, str], told: Callable[[Sight], None] = lambda _: None) -> Fork:
    """Request a forked process from the zygote of `home`. While a zygote is starting, wait for it as long as policy.py recommends.

    Calls `told` after each check of a zygote that it waits for. Raises NoZygote.
    """
    watch = Watch(home)
    while True:
        attempt = asyncio.create_task(_fork(home, order, facts), name="fork")
        try:
            while not (await asyncio.wait({attempt}, timeout=POLL_S))[0]:
                _check_worth(watch, told)
        except BaseException:
            await _abandon(attempt)
            raise
        try:
            return attempt.result()
        except _Differs as differs:
            if watch.look().wants != wire.digest(facts):
                raise
            log.info("waiting for the next zygote", extra={"action": "zygote", "detail": str(differs)})
        except _NotThere:
            pass
        _check_worth(watch, told)
        await asyncio.sleep(POLL_S / 5)


async def _abandon(attempt: "asyncio.Task[Fork]") -> None:
    attempt.cancel()
    await asyncio.wait({attempt})
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().connection.close()  # the fork succeeded during the cancellation; without its connection, the process ends


def _check_worth(watch: Watch, told: Callable[[Sight], None]) -> None:
    seen = watch.look()
    if reason := why_plain(seen):
        raise NoZygote(reason)
    told(seen)


async def _fork(home: Path, order: Order, facts: Mapping[str, str]) -> Fork:
    """Request a forked process without a time limit. Raises NoZygote or _NotThere."""
    loop = asyncio.get_running_loop()
    connection = wire.channel()
    connection.setblocking(False)
    try:
        await _connect(connection, home)
        hello = await _receive(loop, connection)
        _check_facts(facts, hello)
        request = {"do": "fork", "module": order.module, "arguments": order.arguments, "kept": order.kept}
        await loop.sock_sendall(connection, json.dumps(request).encode())
        answer = await _receive(loop, connection)
        _check_accepted(answer)
        # From here on, the forked process reads from the connection. The environment, which may hold secrets, never reaches the zygote.
        rest = {"environment": dict(order.environment), "folder": str(Path.cwd()), "log": str(order.log.absolute())}
        await loop.sock_sendall(connection, json.dumps(rest).encode())
        return Fork(int((await _receive(loop, connection))["pid"]), connection)
    except OSError as error:
        connection.close()
        raise _NotThere(repr(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        connection.close()
        raise NoZygote(f"the zygote's answer could not be read: {error!r}") from error
    except BaseException:
        connection.close()
        raise


def _check_facts(facts: Mapping[str, str], hello: Mapping[str, Any]) -> None:
    if differs := wire.difference(facts, hello.get("facts", {})):
        raise _Differs(f"the zygote cannot be used: it was started with another {differs}")


def _check_accepted(answer: Mapping[str, Any]) -> None:
    if "refused" in answer:
        raise NoZygote(f"the zygote cannot be used: {answer['refused']}")


def go(forked: Fork) -> None:
    """Let a process that is not kept run. Raises NoZygote if the process has ended."""
    with forked.connection as connection:
        try:
            wire.send(connection, {"do": "go"})
        except OSError as error:
            raise NoZygote(f"the forked process is gone: {error!r}") from error


async def _connect(connection: socket.socket, home: Path) -> None:
    with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
        connection.connect(path)  # a local socket connects immediately or fails


async def _receive(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> dict[str, Any]:
    data = await loop.sock_recv(connection, wire.MAX_BYTES)
    if not data:
        raise ConnectionError("it hung up")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise TypeError("not a message")
    return message


class ForkedProcess:
    """A kept process, with the interface of asyncio's subprocesses. Its keeper reaps it and reports its exit code. If the keeper is killed,
    the kernel kills the process as well."""

    def __init__(self, forked: Fork) -> None:
        self.pid = forked.pid
        self.returncode: int | None = None
        self._connection = forked.connection
        self._pidfd = os.pidfd_open(forked.pid)
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._connection, self._hear)

    def _hear(self) -> None:
        try:
            message = wire.receive(self._connection)
        except BlockingIOError:
            return
        except (OSError, ValueError, TypeError):
            message = None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection)
        self._connection.close()
        if message is not None and "exit" in message:
            self._finish(int(message["exit"]))
        else:
            # The keeper has ended, so the kernel kills the process. Kill it here as well, and wait for its end.
            self.kill()
            loop.add_reader(self._pidfd, self._gone)

    def _gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._finish(-signal.SIGKILL)

    def _finish(self, code: int) -> None:
        self.returncode = code
        os.close(self._pidfd)
        self._ended.set_result(code)

    async def wait(self) -> int:
        """Wait for the end of the process. Returns the exit code, which is negative for a signal."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process. Raises ProcessLookupError if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Kill the process. Its keeper kills the rest of its process group."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)


def start(home: Path, environment: Mapping[str, str], idle_s: float, *, cpu: bool) -> subprocess.Popen[bytes]:
    """Start the zygote of `home`. If one runs already, the new process ends immediately. The zygote is independent of this process and ends
    `idle_s` seconds after its last request. `cpu` selects vLLM's CPU build. Raises OSError."""
    place = wire.folder(home)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    variables = dict(environment) | ONE_THREAD | ({"LD_PRELOAD": preloads(environment)} if cpu else {})
    variables[wire.FACTS] = json.dumps(wire.facts(environment))
    with (place / "zygote.log").open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "lmaas.engine.zygote", str(home), str(idle_s), ROOM_FOR_NAMES],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=variables,
        )
    (place / wire.PROCESS).write_text(str(child.pid))
    log.info("starting the zygote", extra={"action": "zygote", "detail": f"pid {child.pid}"})
    return child


def preloads(environment: Mapping[str, str]) -> str:
    """Return the value of LD_PRELOAD for the zygote: the libraries that vLLM preloads in a worker on a CPU
    (`vllm.platforms.cpu.check_and_update_config`). A forked process is too late to preload them, so the zygote does."""
    preloaded = environment.get("LD_PRELOAD", "")
    torch, vllm = (importlib.util.find_spec(name) for name in ("torch", "vllm"))
    if torch is not None and torch.origin and not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        folder = Path(torch.origin).parent
        found = [*folder.parent.glob("torch.libs/libgomp*.so*"), *folder.glob("lib/libgomp*.so*")]
        preloaded = ":".join([*filter(None, [preloaded]), *map(str, found[:1])])
    if vllm is not None and vllm.origin and "libtcmalloc" not in preloaded:
        folder = Path(vllm.origin).parent / "libs"
        found = [*folder.glob("libtcmalloc_minimal*.so*"), *folder.glob("libtcmalloc.so*")]
        preloaded = ":".join([*map(str, found[:1]), *filter(None, [preloaded])])
    return preloaded

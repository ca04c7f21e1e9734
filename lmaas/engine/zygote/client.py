"""Start a zygote, and have it fork processes."""

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

#: One thread in every library: a thread pool of OpenMP or BLAS does not survive a fork. Engines set their own numbers (see preload.py).
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "SPT_NOENV": "1"}
#: A process's name, as `ps` shows it, has no more room than its first command line had.
ROOM_FOR_NAMES = " " * 400
#: How long a supervisor waits for a zygote: it starts in about a second by itself.
SUPERVISOR_FORK_TIMEOUT_S = 0.3
#: How often a zygote that does not answer is looked at.
POLL_S = 0.5


class NoZygote(Exception):
    """The zygote forks no process, for the reason given: start it plainly."""


class _NotThere(Exception):
    """No zygote listens, or it ended meanwhile. Another may come."""


class _Differs(NoZygote):
    """The zygote was started with other facts. Its owner replaces it, unless the owner's facts are those."""


@dataclass(frozen=True, slots=True)
class Order:
    """A process to fork: `main()` of `module` runs with these arguments, this environment and nothing of the zygote's own; what it prints
    is appended to `log`. `kept`: it ends when the process that ordered it ends."""

    module: str
    arguments: list[str]
    environment: Mapping[str, str]
    log: Path
    kept: bool


@dataclass(frozen=True, slots=True)
class Fork:
    """A process that was forked. `connection` leads to its keeper if it is kept; the caller must close it."""

    pid: int
    connection: socket.socket


async def fork(home: Path, order: Order, facts: Mapping[str, str], timeout_s: float) -> Fork:
    """Have the zygote of `home` fork a process, if it answers within `timeout_s` seconds. One that is not kept waits until `go` is called.

    Raises NoZygote.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _fork(home, order, facts)
    except (TimeoutError, _NotThere) as error:
        raise NoZygote(f"the zygote did not answer: {error!r}") from error


async def fork_when_there(home: Path, order: Order, facts: Mapping[str, str], told: Callable[[Sight], None] = lambda _: None) -> Fork:
    """Have the zygote of `home` fork a process, and wait for a zygote that is on its way as long as policy.py finds it worth waiting for.

    `told` is called with each look at a zygote that is waited for. Raises NoZygote.
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
        attempt.result().connection.close()  # it was there in the same moment; without its connection it ends


def _check_worth(watch: Watch, told: Callable[[Sight], None]) -> None:
    seen = watch.look()
    if reason := why_plain(seen):
        raise NoZygote(reason)
    told(seen)


async def _fork(home: Path, order: Order, facts: Mapping[str, str]) -> Fork:
    """Have the zygote fork a process, however long it takes to answer. Raises NoZygote or _NotThere."""
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
        # From here on it is the forked process that listens. The environment, which may hold secrets, never reaches the zygote.
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
    """Let a process that is not kept run. Raises NoZygote if it is gone."""
    with forked.connection as connection:
        try:
            wire.send(connection, {"do": "go"})
        except OSError as error:
            raise NoZygote(f"the forked process is gone: {error!r}") from error


async def _connect(connection: socket.socket, home: Path) -> None:
    with wire.short_path(wire.folder(home) / wire.SOCKET) as path:
        connection.connect(path)  # a local socket answers at once or never


async def _receive(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> dict[str, Any]:
    data = await loop.sock_recv(connection, wire.MAX_BYTES)
    if not data:
        raise ConnectionError("it hung up")
    message = json.loads(data)
    if not isinstance(message, dict):
        raise TypeError("not a message")
    return message


class ForkedProcess:
    """A kept process, seen as asyncio sees its own subprocesses. Its keeper reaps it and reports how it ended; if the keeper is killed, the
    kernel kills the process as well."""

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
            # The keeper is gone. The kernel kills what it kept; make sure, and wait for it.
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
        """Wait for the end. Returns the exit code, negative for a signal."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        """Send a signal to the process. Raises ProcessLookupError if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Kill the process; its keeper kills what belongs to it."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)


def start(home: Path, environment: Mapping[str, str], idle_s: float, *, cpu: bool) -> subprocess.Popen[bytes]:
    """Start the zygote of `home`, unless one runs: then what is started here ends at once. It does not depend on us: it ends by itself
    `idle_s` seconds after its last request. `cpu`: for vLLM's CPU build. Raises OSError."""
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
    """The libraries that vLLM preloads in a worker on a CPU (`vllm.platforms.cpu.check_and_update_config`): what is forked cannot load
    them first any more, so the zygote has them."""
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

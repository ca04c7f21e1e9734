"""The zygote's loop: one thread, which waits on a socket and forks."""

import contextlib
import fcntl
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from lmaas.engine.zygote import wire
from lmaas.engine.zygote.commands import SERVER
from lmaas.engine.zygote.keeper import keep
from lmaas.engine.zygote.progress import Reporter
from lmaas.process import die_with_parent

log = logging.getLogger(__name__)

#: The time that a client may take to send its request, and to let the forked process continue.
REQUEST_S, GO_S = 1.0, 10.0
#: The time after the last fork after which the zygote prepares for further engines of that kind. Until then, the preparation would slow
#: down the engine's start.
LEARN_AFTER_S = 10.0
#: The maximum number of connections that wait in the socket's queue.
BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Program:
    """The program that a forked process runs: `main()` of a module."""

    module: str
    arguments: list[str]


class Zygote:
    """Serves the socket of one home folder. `unfit` returns the reason why this process must not be forked any more. `learn` is called with
    each engine's command line when no client waits. The zygote ends after `idle_s` seconds without a request."""

    def __init__(
        self,
        home: Path,
        idle_s: float,
        facts: Mapping[str, str],
        added: Mapping[str, str],
        unfit: Callable[[], str],
        learn: Callable[[list[str]], None],
    ) -> None:
        self._folder, self._idle_s, self._facts, self._added, self._unfit, self._learn = (
            wire.folder(home),
            idle_s,
            facts,
            added,
            unfit,
            learn,
        )
        self._seen: list[list[str]] = []
        self._forked = 0.0

    def serve(self, listener: socket.socket) -> Program | None:
        """Fork on request until the zygote is not needed any more. Returns in each forked process, with the program to run, and in the
        zygote itself, with None."""
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        needed = time.monotonic()
        while time.monotonic() - needed < self._idle_s:
            if not poll.poll(1000):
                if self._seen and time.monotonic() - self._forked > LEARN_AFTER_S:
                    try:
                        self._learn(self._seen.pop())
                    except OSError as error:
                        log.warning("what was learnt is not kept: %r", error)
                    _settle()
                    if self._ends():
                        return None
                continue
            needed = time.monotonic()
            connection, _ = listener.accept()
            with connection:
                try:
                    program = self._answer(connection, listener)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    # The client has disconnected, or is not a client of lmaas.
                    log.warning("a client was not served: %r", error)
                    continue
                if program is not None:
                    return program
            if self._ends():
                return None
        log.info("the zygote has not been used for %.0f s and ends", self._idle_s)
        return None

    def _ends(self) -> bool:
        if reason := self._unfit():
            log.error("the zygote ends: %s", reason)
        return bool(reason)

    def _answer(self, connection: socket.socket, listener: socket.socket) -> Program | None:
        connection.settimeout(REQUEST_S)
        wire.send(connection, {"facts": self._facts, "pid": os.getpid()})
        request = wire.receive(connection)
        match (request := request or {"do": "nothing"})["do"]:
            case "stop":
                raise SystemExit(0)
            case "fork":
                if reason := self._unfit():
                    wire.send(connection, {"refused": reason})
                    return None
                return self._fork(request, connection, listener)
            case _:
                return None

    def _fork(self, request: dict[str, Any], connection: socket.socket, listener: socket.socket) -> Program | None:
        program, kept = Program(str(request["module"]), [str(argument) for argument in request["arguments"]]), bool(request["kept"])
        if kept and program.module == SERVER and program.arguments not in self._seen:
            self._seen.append(program.arguments)
        self._forked = time.monotonic()
        if os.fork():
            return None
        try:
            listener.close()
            _reset_signals()
            os.setsid()
            connection.settimeout(GO_S)
            # Read the order only after the fork, so that its contents are not in the memory of any other forked process.
            wire.send(connection, {"forked": True})
            order = _hear(connection)
            if kept:
                _be_kept(connection)
            else:
                wire.send(connection, {"pid": os.getpid()})
                _hear(connection)
            connection.close()
            _become(program, order, self._added if kept else {})
        except BaseException:
            log.exception("a forked process could not begin")
            os._exit(1)  # never return into the zygote's loop
        return program


def _hear(connection: socket.socket) -> dict[str, Any]:
    """Return the next message. If the client has disconnected, it has started the process plainly, so this process ends."""
    message = wire.receive(connection)
    if message is None:
        os._exit(0)
    return message


def _settle() -> None:
    """Exempt existing objects from garbage collection. A collection in a forked process would otherwise copy all memory pages."""
    gc.collect()
    gc.freeze()


def _be_kept(connection: socket.socket) -> None:
    """Fork a child and return in it. This process becomes the child's keeper."""
    keeper = os.getpid()
    engine = os.fork()
    if engine:
        setproctitle(f"lmaas: keeps engine {engine}")
        connection.settimeout(None)
        with contextlib.suppress(OSError):
            wire.send(connection, {"pid": engine})
        keep(engine, connection)
        os._exit(0)
    os.setsid()
    _die_with(keeper)
    _bind_descendants()


def _bind_descendants() -> None:
    """Make the children of this process end with it. In a plain start, vLLM's plugins do this; here they were loaded before the fork."""
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=before, after_in_child=lambda: _die_with(parent))


def _die_with(parent: int) -> None:
    try:
        die_with_parent(parent)
    except SystemExit:
        os._exit(1)  # Python ignores exceptions in a hook of a fork


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _become(program: Program, order: dict[str, Any], added: Mapping[str, str]) -> None:
    """Apply the environment, folder, log and name of the order, and remove what belonged to the zygote."""
    environment = {str(name): str(value) for name, value in order["environment"].items()}
    os.environ.clear()
    # In a plain start, vLLM would set these variables while it is imported.
    os.environ.update({**added, **environment})
    os.chdir(order["folder"])
    output = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    logging.getLogger().handlers.clear()
    importlib.import_module("numpy").random.seed()  # Python's own generator is seeded again automatically
    # Use the name of a process that was started plainly.
    module = program.module.removesuffix(".__main__")
    setproctitle(" ".join([sys.executable, "-m", module, *program.arguments]))


@contextmanager
def listening(home: Path) -> Iterator[socket.socket | None]:
    """Yield the listening socket of the only zygote of `home`, or None if there is another one."""
    folder = wire.folder(home)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / wire.LOCK).open("a") as lock, wire.channel() as listener:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose locks forked processes inherit
        except OSError:
            yield None
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        path = folder / wire.SOCKET
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with wire.short_path(path) as short:
                listener.bind(short)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        yield listener


def serve(home: Path, idle_s: float) -> Program | None:
    """Run the zygote of `home`. Returns in each forked process, with the program to run, and in the zygote itself when it ends."""
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s", level=logging.INFO)
    # The zygote does not wait for forked processes. The kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with listening(home) as listener:
        if listener is None:
            log.info("there is a zygote already")
            return None
        setproctitle(f"{sys.executable} -m lmaas.engine.zygote {home}")  # works only while the environment is unchanged
        before = dict(os.environ)
        began, reporter = time.monotonic(), Reporter(home)
        gc.disable()  # an import keeps nearly all objects that it creates; collections would take an eighth of the time
        from lmaas.engine.zygote.preload import Preloaded  # noqa: PLC0415 (imports vLLM, once clients can stand in line)

        preloaded = Preloaded(wire.folder(home) / wire.COMMANDS, reporter.report)
        added = {name: value for name, value in os.environ.items() if before.get(name) != value}
        gc.freeze()  # without a collection, which would delay the first start by half a second and free little
        gc.enable()
        used = os.times()
        reporter.imported(sum(used[:4]))
        reporter.report(1, 1)
        log.info("imported in %.1f s, %.1f s of processor time", time.monotonic() - began, sum(used[:4]))
        facts = json.loads(os.environ.get(wire.FACTS, "{}"))
        return Zygote(home, idle_s, facts, added, preloaded.unfit, preloaded.learn).serve(listener)

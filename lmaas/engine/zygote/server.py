"""The zygote's own loop: one thread, which waits on a socket and forks."""

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

#: How long a client may take for its request, and for its word to go on.
REQUEST_S, GO_S = 1.0, 10.0
#: A second engine of a kind is prepared for once the first one's start is not disturbed by that.
LEARN_AFTER_S = 10.0
#: How many peers may stand in line.
BACKLOG = 64


@dataclass(frozen=True, slots=True)
class Program:
    """What a forked process is to become: `main()` of a module."""

    module: str
    arguments: list[str]


class Zygote:
    """Serves the socket of one home folder. `unfit` returns why this process must not be forked any more, `learn` is called with each
    engine's command line when no client waits, and without requests the zygote ends after `idle_s`."""

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
        """Fork until the zygote is not needed any more. Returns in a forked process, with what it is to become, and in the zygote with
        None."""
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
                    # The client left, or is not a client of lmaas.
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
            # Only now: what is in this order, no other fork may find in its memory.
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
            os._exit(1)  # never back into the loop of the zygote
        return program


def _hear(connection: socket.socket) -> dict[str, Any]:
    """Return the next message. A client that gave up has started the process plainly; then this process ends."""
    message = wire.receive(connection)
    if message is None:
        os._exit(0)
    return message


def _settle() -> None:
    """Exempt existing objects from garbage collection, so that it does not copy every page in a forked process."""
    gc.collect()
    gc.freeze()


def _be_kept(connection: socket.socket) -> None:
    """Return in a child of this process, which becomes its keeper."""
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
    """What this process forks dies with it: vLLM's plugins, which see to that in a plain start, are loaded before the fork here."""
    parent = 0

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=before, after_in_child=lambda: _die_with(parent))


def _die_with(parent: int) -> None:
    try:
        die_with_parent(parent)
    except SystemExit:
        os._exit(1)  # Python ignores what is raised in a hook of a fork


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _become(program: Program, order: dict[str, Any], added: Mapping[str, str]) -> None:
    """Take over what was asked for: environment, folder, log and name; and shed what belonged to the zygote."""
    environment = {str(name): str(value) for name, value in order["environment"].items()}
    os.environ.clear()
    # What vLLM set while it was imported, it would have set here too.
    os.environ.update({**added, **environment})
    os.chdir(order["folder"])
    output = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    logging.getLogger().handlers.clear()
    importlib.import_module("numpy").random.seed()  # Python's own generator sees to that itself
    # As if it had been started plainly.
    module = program.module.removesuffix(".__main__")
    setproctitle(" ".join([sys.executable, "-m", module, *program.arguments]))


@contextmanager
def listening(home: Path) -> Iterator[socket.socket | None]:
    """The listening socket of the one zygote of `home`; None if there is another one."""
    folder = wire.folder(home)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / wire.LOCK).open("a") as lock, wire.channel() as listener:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the forked processes would hold too
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
    """Be the zygote of `home`. Returns in forked processes, with what they are to become, and in the zygote itself at its end."""
    logging.basicConfig(format="%(asctime)s %(process)d %(message)s", level=logging.INFO)
    # The zygote does not wait for forked processes; the kernel removes them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with listening(home) as listener:
        if listener is None:
            log.info("there is a zygote already")
            return None
        setproctitle(f"{sys.executable} -m lmaas.engine.zygote {home}")  # finds its place only while the environment is untouched
        before = dict(os.environ)
        began, reporter = time.monotonic(), Reporter(home)
        gc.disable()  # nearly all that an import makes stays: looking through it again and again is an eighth of the time
        from lmaas.engine.zygote.preload import Preloaded  # noqa: PLC0415 (imports vLLM, once clients can stand in line)

        preloaded = Preloaded(wire.folder(home) / wire.COMMANDS, reporter.report)
        added = {name: value for name, value in os.environ.items() if before.get(name) != value}
        gc.freeze()  # without a collection, which would take half a second of the first start and find little
        gc.enable()
        used = os.times()
        reporter.imported(sum(used[:4]))
        reporter.report(1, 1)
        log.info("imported in %.1f s, %.1f s of processor time", time.monotonic() - began, sum(used[:4]))
        facts = json.loads(os.environ.get(wire.FACTS, "{}"))
        return Zygote(home, idle_s, facts, added, preloaded.unfit, preloaded.learn).serve(listener)

"""The checker of one base model: `main` listens on a Unix socket, and checks each grammar and reads each prompt in a separate child
process.

A client connects, sends one Question or Prompt, closes its side of the connection, and receives one Verdict or Tokens. The child has
limits on CPU time, memory and files. If it dies, from a limit or for another reason, the parent sends a Verdict. The parent has a single
thread, so that it can fork, and ends after some idle time.

Started as `python -m lmaas.engine.grammars.checker SOCKET IDLE_S ENGINE_ARGUMENT...`, or forked by the zygote.
"""

import contextlib
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from setproctitle import setproctitle

from lmaas.engine.grammars.compile import ADVICE, Compiler
from lmaas.engine.grammars.prompts import PromptReader
from lmaas.engine.grammars.verdict import (
    CPU_S,
    INVALID,
    MAX_QUESTION_BYTES,
    MEMORY_BYTES,
    PROMPT_CPU_S,
    PROMPT_MEMORY_BYTES,
    TOO_COMPLEX,
    UNKNOWN,
    WALL_S,
    Prompt,
    Question,
    Tokens,
    Verdict,
    decode_asked,
    encode,
)
from lmaas.engine.zygote.wire import short_path
from lmaas.process import die_with_parent

log = logging.getLogger(__name__)

#: The number of checks that run at once. Further clients wait in the socket's queue.
AT_ONCE = 2
BACKLOG = 256
#: The time that a client may take to send its question.
QUESTION_S = 5.0
#: Runs the check that a client requests.
Answer = Callable[[Question | Prompt], Verdict | Tokens]
#: The scheduling priority of a checker, below that of engines that serve.
NICENESS = 10
#: Memory of a child besides the grammar's: a thread's stack, and address space that its allocator reserves.
RESERVED_BYTES = 160 * 1024 * 1024
POLL_S = 1.0


@dataclass(slots=True)
class Check:
    """A running check, or a prompt that is being read: its process, its client, and its start by time.monotonic()."""

    pidfd: int
    client: socket.socket
    began: float
    stopped: bool = False


class Checker:
    """Serves checks on `listener` until it has been idle for `idle_s` seconds. `answer` is called in the children."""

    def __init__(self, answer: Answer, listener: socket.socket, idle_s: float) -> None:
        self._answer, self._listener, self._idle_s = answer, listener, idle_s
        self._running: dict[int, Check] = {}
        self._asked = time.monotonic()

    def serve(self) -> None:
        """Serve until idle."""
        while self._running or time.monotonic() - self._asked < self._idle_s:
            poll = select.poll()
            if len(self._running) < AT_ONCE:
                poll.register(self._listener, select.POLLIN)
            for check in self._running.values():
                poll.register(check.pidfd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(POLL_S * 1000)}
            for pid, check in list(self._running.items()):
                if check.pidfd in ready:
                    self._finish(pid, check)
                elif time.monotonic() - check.began > WALL_S and not check.stopped:
                    check.stopped = True
                    signal.pidfd_send_signal(check.pidfd, signal.SIGKILL)
            if self._listener.fileno() in ready:
                self._begin()

    def _begin(self) -> None:
        self._asked = time.monotonic()
        client, _ = self._listener.accept()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._reply(client, parent)  # does not return
        self._running[pid] = Check(os.pidfd_open(pid), client, self._asked)

    def _finish(self, pid: int, check: Check) -> None:
        del self._running[pid]
        os.close(check.pidfd)
        _, status, usage = os.wait4(pid, 0)
        with check.client:
            if status == 0:
                return  # the child has sent its answer
            verdict = _died(os.waitstatus_to_exitcode(status), check, usage.ru_utime + usage.ru_stime)
            with contextlib.suppress(OSError):
                check.client.sendall(encode(verdict))

    def _reply(self, client: socket.socket, parent: int) -> None:
        """Read the question in the child process, compute the answer within the limits, send it, and exit."""
        try:
            die_with_parent(parent)
            self._listener.close()
            client.settimeout(QUESTION_S)
            asked = decode_asked(_read(client))
            if isinstance(asked, Prompt):
                _limit(PROMPT_CPU_S, PROMPT_MEMORY_BYTES)
            else:
                _limit(CPU_S, MEMORY_BYTES)
            client.sendall(encode(self._answer(asked)))
            os._exit(0)
        except (OSError, msgspec.DecodeError, RecursionError):
            os._exit(1)  # the client has disconnected, or is not a client of lmaas
        except BaseException:  # noqa: BLE001 (a forked process must never return into its parent's loop)
            os._exit(2)


def _died(code: int, check: Check, cpu_s: float) -> Verdict:
    """Return the verdict on a grammar whose check ended with this exit code, which is negative for a signal."""
    if check.stopped:
        return Verdict(UNKNOWN, "Its check took too long on this machine.", cpu_s=cpu_s)
    if code == 1 or -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        # Killed from outside, for example because the machine is out of memory. This is not a verdict about the grammar.
        return Verdict(UNKNOWN, "It could not be checked.", cpu_s=cpu_s)
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        return Verdict(TOO_COMPLEX, f"Compiling this request's grammar takes more than {CPU_S:g} s. {ADVICE}", cpu_s=cpu_s)
    if code < 0:
        # Out of memory, or of stack.
        return Verdict(TOO_COMPLEX, f"Compiling this request's grammar takes too much memory. {ADVICE}", cpu_s=cpu_s)
    return Verdict(INVALID, "This request's grammar cannot be compiled.", cpu_s=cpu_s)


def _read(client: socket.socket) -> bytes:
    parts, size = [], 0
    while part := client.recv(1 << 16):
        size += len(part)
        if size > MAX_QUESTION_BYTES:
            raise OSError("a question without an end")
        parts.append(part)
    return b"".join(parts)


def _limit(cpu_s: float, memory_bytes: int) -> None:
    """Limit the resources that this process may use from now on. Beyond a limit, it is killed by a signal, or MemoryError is raised."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(quiet, stream)  # the grammar library prints tenants' text, without a bound
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    seconds = int(cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = pages * resource.getpagesize() + memory_bytes + RESERVED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))


def answering(reader: PromptReader) -> Answer:
    """Return the function that checks grammars and reads prompts. A pooling engine compiles no grammars, so none is compiled here."""
    compiler = None if reader.pooling else Compiler(reader)

    def answer(asked: Question | Prompt) -> Verdict | Tokens:
        if isinstance(asked, Prompt):
            return reader.read(asked)
        return compiler.check(asked) if compiler is not None else Verdict(INVALID, "This model generates no text.")

    return answer


def main() -> None:
    """Run the checker. Prints nothing about the grammars."""
    path, idle_s, arguments = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    name = arguments[arguments.index("--served-model-name") + 1]
    sys.argv = [sys.argv[0], *arguments]  # the key of the prepared tokenizer
    os.nice(NICENESS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the tokenizer starts a thread for each processor, and this one must fork
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answer = answering(PromptReader(arguments))
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        sys.exit(f"the checker has {threads} threads, of which its children would keep one")
    gc.collect()
    gc.freeze()
    setproctitle(f"lmaas: checks grammars of {name}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            with short_path(path) as short:
                listener.bind(short)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        Checker(answer, listener, idle_s).serve()
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
